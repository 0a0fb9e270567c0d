"""Token statistics of the training split, counted by the workers and saved as statistics.npz."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from bitlm_dist.data.manifest import MANIFEST
from bitlm_dist.data_prep import output_dir, output_units, statistics
from bitlm_dist.data_prep.pool import Pool
from bitlm_dist.data_prep.stage_timer import StageTimer
from bitlm_dist.data_prep.statistics import ContextTokens
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.data_prep.worker import CountTask

MAX_STATISTICS_TOKENS = 50_000_000  # of the training split, for counts and context vectors
TOKENS_PER_COUNT_TASK = 2_000_000


def write_statistics(
    out: Path, names: Sequence[str], tokenizer: Tokenizer, pool: Pool, timer: StageTimer
) -> None:
    """Write token counts, context vectors and bytes per token; a no-op if all are up to date.

    Args:
        out: The prepared folder; its index files must be written.
        names: Names of all units, in order.
        tokenizer: The tokenizer that produced the units.
        pool: Workers that count.
        timer: Receives the CPU seconds of the workers.
    """
    manifest = output_dir.read_manifest_if_finished(out)
    if manifest and manifest["files"] == output_dir.file_hashes(out):
        return
    (out / MANIFEST).unlink(missing_ok=True)

    counter = _UnitCounter(out, tokenizer.vocab_size, pool, timer)
    counts = sum(part.token_counts for part in counter.count(names, MAX_STATISTICS_TOKENS, None))

    # The pairs take a second pass: which tokens count as context follows from the first.
    context = statistics.select_context_tokens(counts)
    max_tokens = (
        MAX_STATISTICS_TOKENS
        if tokenizer.vocab_size <= statistics.ROWS
        else statistics.MAX_PAIR_TOKENS
    )
    pairs = (part.pair_counts for part in counter.count(names, max_tokens, context))
    contexts = statistics.context_vectors(statistics.merge_pair_counts(pairs, context), context)

    partial = out / f".{output_dir.STATISTICS_FILE}"
    statistics.save_statistics(partial, counts, contexts, tokenizer.byte_lengths.inside)
    partial.rename(out / output_dir.STATISTICS_FILE)


class _UnitCounter:
    """Counts tokens or pairs of the first units, in tasks of several units each."""

    def __init__(self, out: Path, vocab_size: int, pool: Pool, timer: StageTimer) -> None:
        self._out = out
        self._vocab_size = vocab_size
        self._pool = pool
        self._timer = timer

    def count(
        self, names: Sequence[str], max_tokens: int, context: ContextTokens | None
    ) -> Iterator[Any]:
        """Yield partial counts over the first units that together have ``max_tokens`` tokens."""
        waiting: deque[Future[Any]] = deque()
        for group in self._unit_groups(names, max_tokens):
            waiting.append(self._pool.submit(CountTask(group, self._vocab_size, context)))
            if len(waiting) > self._pool.max_in_flight:
                yield self._collect(waiting.popleft())

        for future in waiting:
            yield self._collect(future)

    def _unit_groups(self, names: Sequence[str], max_tokens: int) -> Iterator[tuple[str, ...]]:
        """Group units into tasks of at least TOKENS_PER_COUNT_TASK tokens; the last may be less."""
        group: list[str] = []
        total = group_tokens = 0
        for name in names:
            group.append(name)
            tokens = output_units.read_unit_record(self._out, name)["train"]["tokens"]
            total += tokens
            group_tokens += tokens
            if group_tokens >= TOKENS_PER_COUNT_TASK or total >= max_tokens:
                yield tuple(group)
                group = []
                group_tokens = 0

            if total >= max_tokens:
                return

        if group:
            yield tuple(group)

    def _collect(self, future: "Future[Any]") -> Any:
        counted = future.result()
        # With one worker the task ran in this process, whose own timer has counted it.
        if self._pool.num_workers > 1:
            self._timer.add(counted.seconds)
        return counted
