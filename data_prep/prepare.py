"""`bitlm prep`: text -> a folder of MDS shards that training reads.

Files are cut into chunks (sources); workers parse, clean and filter them (reading); this process drops duplicates in corpus order
(deduplication) and cuts what stays into units of a few megabytes; workers tokenize and write these (units). The folder is a
function of the text and the settings alone: a rerun after any kill skips the units that are there and gives the same tree to the
byte. It then holds::

    manifest.json            counts, tokenizer, settings, hashes; written last: without it the folder is not ready
    report.md                a page: documents in and out, and why the others were dropped
    settings.json            what the folder was begun with; another call must agree
    tokenizer/               the tokenizer's files
    statistics.npz           token counts and context vectors of the training split (for codes), bytes of each token
    units/NNNNN-KEY.json     what one unit holds
    train/index.json         one index over all units; lengths.npy: tokens of each document
    train/NNNNN-KEY/         shards of one unit, zstd, with hashes
    validation/              the same for held-out documents
"""

import hashlib
import itertools
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bitlm_dist.data_prep import folder, mds, round_trip, sources, statistics, units
from bitlm_dist.data_prep.clock import Clock
from bitlm_dist.data_prep.deduplication import Deduplication
from bitlm_dist.data_prep.finding import File, find_files, left_out_in_words, plain
from bitlm_dist.data_prep.lone_document import place_to_cut
from bitlm_dist.data_prep.pool import Pool
from bitlm_dist.data_prep.reading import CHANGES, REASONS
from bitlm_dist.data_prep.report import Totals, dropped_in_words, markdown, warnings_of
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.statistics import Context
from bitlm_dist.data_prep.tokenizer import SMALLEST_BPE, TOKENIZER, Tokenizer, find_tokenizer, train_bpe
from bitlm_dist.data_prep.units import Unit
from bitlm_dist.data_prep.worker import Count, Job, usage

from bitlm_dist.data.manifest import MANIFEST, MANIFEST_VERSION, SPLITS
from bitlm_dist.errors import UserError
from bitlm_dist.files import sync_tree, to_json, write_atomically

BPE = "bpe:"
BPE_BYTES = 500_000_000  # of text that a BPE is trained on at most
STATISTICS_TOKENS = 50_000_000  # of the training split, for counts and context vectors
COUNT_TOKENS = 2_000_000  # that a worker counts at a time


@dataclass(frozen=True)
class Progress:
    """How far a preparation is: what it does, bytes of the corpus as stored (``total`` 0: unknown), bytes of text, documents."""

    phase: str
    done: int
    total: int
    text_bytes: int
    documents: int


@dataclass(frozen=True)
class Report:
    """What a preparation did.

    ``warnings`` is about the tokenizer: what it is not allowed to do, and what it does not give back.
    ``cpu_seconds`` has the stages and, as ``all``, the processes' whole time; ``peak_memory_bytes`` adds the peaks of all
    processes, which is no less than the peak of their sum; ``left_out`` counts the files of folders that were not read, by reason.
    """

    documents: int
    tokens: int
    text_bytes: int
    units: int
    units_reused: int
    unigram_nats: float
    documents_read: int
    dropped: dict[str, int]
    dropped_in_words: str
    warnings: list[str]
    workers: int
    seconds: float
    cpu_seconds: dict[str, float]
    peak_memory_bytes: int
    left_out: dict[str, int]


Observe = Callable[[Progress], None]
Say = Callable[[str], None]


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str,
    out: Path,
    validation: float = 0.05,
    settings: Settings | None = None,
    workers: int = 1,
    observe: Observe | None = None,
    say: Say = lambda line: None,
) -> Report:
    """Write the shards of ``inputs`` to ``out``; a second call with the same arguments finds everything done.

    Args:
        inputs: files, folders or fsspec URLs, see :mod:`bitlm_dist.data_prep.finding`.
        tokenizer: a file, a folder that holds one, ``package:DISTRIBUTION:FILE``, or ``bpe:SIZE`` to train a byte-level BPE on
            the documents that stay.
        out: folder; new, or one that the same call began.
        validation: share of documents held out, chosen by a hash of their text; of a lone document, the share of its end.
        settings: which documents stay.
        workers: processes that read and tokenize; they change nothing but the time.
        observe: called after each chunk.
        say: called with each line that the user should read: files that are left out, a lone document that is cut.

    Raises:
        UserError: an input, the tokenizer, a setting or ``out`` does not fit. Finished units stay; what exists otherwise is not
            altered.
    """
    settings = settings or Settings()
    settings.check()
    if not 0 <= validation < 1:
        raise UserError(f"--validation {validation}: expected a share from 0 to below 1")
    if workers < 1:
        raise UserError(f"--workers {workers}: expected at least 1")
    left_out: Counter[str] = Counter()
    files = find_files(inputs, left_out)
    if left_out:
        say(left_out_in_words(left_out))
    given = _given_tokenizer(tokenizer)
    names = hashlib.sha256("\n".join(file.name for file in files).encode()).hexdigest()[:16]
    claim = {
        "version": MANIFEST_VERSION,
        "tokenizer": f"{given.file.name} {given.fingerprint[:16]}" if given else tokenizer,
        "validation": validation,
        "inputs": f"{len(files)} files, names {names}",
        **settings.record(),
    }
    if all(file.size for file in files):
        workers = min(workers, max(1, sum(file.size for file in files) // sources.CHUNK_BYTES))
    with folder.claimed(out, claim) as work, Pool(workers, Job(settings, out, validation)) as pool:
        return _Preparation(list(map(str, inputs)), files, left_out, claim, out, work, pool, observe, say).run(tokenizer, given)


def _given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer that ``name`` stands for, None for one to be trained."""
    if not name.startswith(BPE):
        return Tokenizer(find_tokenizer(name))
    if not name[len(BPE) :].isdigit() or int(name[len(BPE) :]) < SMALLEST_BPE:
        raise UserError(f"--tokenizer {name}: write bpe:SIZE with a size of at least {SMALLEST_BPE}, e.g. bpe:4096")
    return None


class _Preparation:
    """One call of :func:`prepare` in a folder that it has claimed."""

    def __init__(
        self,
        inputs: list[str],
        files: Sequence[File],
        left_out: Counter[str],
        claim: Mapping[str, Any],
        out: Path,
        work: Path,
        pool: Pool,
        observe: Observe | None,
        say: Say,
    ) -> None:
        self._inputs, self._files, self._left_out = inputs, files, left_out
        self._claim, self._out, self._work = claim, out, work
        self._pool, self._observe, self._say = pool, observe, say
        self._notes: list[str] = []  # on what was done with the text
        self._settings, self._validation = pool.job.settings, pool.job.validation
        self._clock = Clock()
        self._began = time.perf_counter()

    def run(self, name: str, given: Tokenizer | None) -> Report:
        tokenizer = self._tokenizer(name, given)
        self._pool.use(tokenizer)
        totals = Totals(self._inputs)
        names, reused = self._write_units(tokenizer, totals)
        if not names:
            reasons = dropped_in_words(totals.sum())
            raise UserError(f"{', '.join(map(plain, self._inputs))}: no document is left; dropped: {reasons}")
        with self._clock("index"):
            if units.others(self._out, names):  # the manifest speaks of them
                (self._out / MANIFEST).unlink(missing_ok=True)
            splits = folder.merge(self._out, names)
            if not splits["train"]["documents"]:
                raise UserError(
                    f"{self._out}: every document fell into the validation split: lower --validation or give more documents"
                )
            units.remove_others(self._out, names)
        with self._clock("statistics"):
            self._write_statistics(names, tokenizer)
        self._pool.end()
        manifest = self._manifest(tokenizer, names, splits, totals)
        with self._clock("index"):
            (self._out / folder.REPORT).write_text(markdown(manifest), encoding="utf-8")
            folder.flush(self._out)
            write_atomically(self._out / MANIFEST, to_json(manifest, indent=1) + "\n")
        return self._report(manifest, reused)

    def _tokenizer(self, name: str, given: Tokenizer | None) -> Tokenizer:
        place = self._out / TOKENIZER
        if place.is_dir():
            return given or Tokenizer.of_folder(place)
        building = self._out / f".{TOKENIZER}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        if given:
            given.save(building)
        else:
            texts = self._kept(Totals(self._inputs), f"training {name}")
            train_bpe(_first_bytes(texts, BPE_BYTES), int(name[len(BPE) :]), building / "tokenizer.json")
        sync_tree(building)
        building.rename(place)
        return given or Tokenizer.of_folder(place)

    def _kept(self, totals: Totals, phase: str) -> Iterator[tuple[bytes, bytes]]:
        """(text, SHA-256) of the documents that stay, in corpus order."""
        work = self._work / phase.replace(":", "-")
        deduplication = Deduplication(work, self._settings.exact_dedup, self._settings.near_dedup)
        read = written = 0
        size = sum(file.size for file in self._files) if all(file.size for file in self._files) else 0
        for future in self._in_order():
            batch = future.result()
            self._clock.add(batch.seconds)
            with self._clock("deduplicate"):
                reasons = deduplication.reasons(batch.hashes, batch.signatures)
            totals.add(batch, reasons)
            read, written = read + batch.counts["read"], written + sum(map(len, batch.texts))
            for text, text_hash, reason in zip(batch.texts, batch.hashes, reasons, strict=True):
                if not reason:
                    yield text, text_hash
            if batch.error:
                raise UserError(batch.error)
            if self._observe:
                self._observe(Progress(phase, batch.position, size, written, read))

    def _in_order(self) -> "Iterator[Future[Any]]":
        """Chunks being read, in corpus order; a few more than there are workers, so that none waits."""
        waiting: deque[Future[Any]] = deque()
        chunks = sources.chunks(self._files, self._settings)
        while True:
            with self._clock("open"):
                chunk = next(chunks, None)
            if chunk is not None:
                waiting.append(self._pool.submit(chunk))
            if len(waiting) > self._ahead or (chunk is None and waiting):
                yield waiting.popleft()
            elif chunk is None:
                return

    @property
    def _ahead(self) -> int:
        return 0 if self._pool.workers == 1 else self._pool.workers + 1

    def _write_units(self, tokenizer: Tokenizer, totals: Totals) -> tuple[list[str], int]:
        """Write the units that are not there -> names of all, and how many were there."""
        names: list[str] = []
        waiting: deque[Future[Any]] = deque()
        reused = 0
        key = to_json([tokenizer.fingerprint, self._validation, mds.LEVEL, self._pool.job.settings.record()])
        for unit in self._units(self._kept(totals, "preparing"), key):
            names.append(unit.name)
            if units.is_done(self._out, unit.name):
                reused += 1
                continue
            (self._out / MANIFEST).unlink(missing_ok=True)
            waiting.append(self._pool.submit(unit))
            while len(waiting) > self._ahead or (waiting and waiting[0].done()):
                self._clock.add(waiting.popleft().result())
        for future in waiting:
            self._clock.add(future.result())
        return names, reused

    def _units(self, documents: Iterator[tuple[bytes, bytes]], key: str) -> Iterator[Unit]:
        first = list(itertools.islice(documents, 2))
        if len(first) > 1 or not first or not self._validation:
            yield from units.cut(itertools.chain(first, documents), self._settings.unit_mb * units.MEGABYTE, key)
            return
        text = first[0][0]
        unit = units.lone(text, place_to_cut(text, self._validation), key)
        held_out = sum(len(unit.texts[i]) for i in unit.held_out or ())
        self._notes.append(
            f"the corpus is one document: its last {100 * held_out / len(text):.1f} % ({held_out:,} bytes) are the validation split"
            if held_out
            else "the corpus is one document, too short to hold out a part of it: there is no validation split"
        )
        self._say(self._notes[-1])
        yield unit

    def _write_statistics(self, names: Sequence[str], tokenizer: Tokenizer) -> None:
        finished = folder.manifest_of(self._out)
        if finished and finished["files"] == folder.hashes(self._out):
            return
        (self._out / MANIFEST).unlink(missing_ok=True)
        vocabulary = tokenizer.vocabulary
        counts = sum(part.tokens for part in self._count(names, STATISTICS_TOKENS, vocabulary, None))
        context = statistics.context_of(counts)
        limit = STATISTICS_TOKENS if vocabulary <= statistics.ROWS else statistics.PAIR_TOKENS
        pairs = (part.pairs for part in self._count(names, limit, vocabulary, context))
        contexts = statistics.context_vectors(statistics.merge(pairs, context), context)
        partial = self._out / f".{folder.STATISTICS}"
        statistics.write(partial, counts, contexts, tokenizer.byte_lengths.inside)
        partial.rename(self._out / folder.STATISTICS)

    def _count(self, names: Sequence[str], limit: int, vocabulary: int, context: Context | None) -> Iterator[Any]:
        """Counts over the first units that have ``limit`` tokens together, in parts."""
        waiting: deque[Future[Any]] = deque()
        for part in self._parts(names, limit):
            waiting.append(self._pool.submit(Count(part, vocabulary, context)))
            if len(waiting) > self._ahead:
                yield self._counted(waiting.popleft())
        for future in waiting:
            yield self._counted(future)

    def _parts(self, names: Sequence[str], limit: int) -> Iterator[tuple[str, ...]]:
        part: list[str] = []
        total = held = 0
        for name in names:
            part.append(name)
            tokens = units.read_record(self._out, name)["train"]["tokens"]
            total, held = total + tokens, held + tokens
            if held >= COUNT_TOKENS or total >= limit:
                yield tuple(part)
                part, held = [], 0
            if total >= limit:
                return
        if part:
            yield tuple(part)

    def _counted(self, future: "Future[Any]") -> Any:
        counted = future.result()
        if self._pool.workers > 1:  # else it is on our own clock
            self._clock.add(counted.seconds)
        return counted

    def _manifest(self, tokenizer: Tokenizer, names: Sequence[str], splits: Mapping[str, Any], totals: Totals) -> dict[str, Any]:
        counts = totals.sum()
        counts["no_tokens"] = sum(units.read_record(self._out, name)["no_tokens"] for name in names)
        return {
            "version": MANIFEST_VERSION,
            "vocabulary": tokenizer.vocabulary,
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
            "tokenizer": {
                "file": tokenizer.file.name,
                "fingerprint": tokenizer.fingerprint,
                "not_applied": tokenizer.not_applied,
            },
            "splits": {split: splits[split] for split in SPLITS},
            "documents": {
                "read": counts["read"],
                "kept": counts["kept"] - counts["no_tokens"],
                "bytes": counts["bytes"],
                "dropped": {reason: counts[reason] for reason in REASONS if counts[reason]},
                "changed": {change: counts[change] for change in CHANGES if counts[change]},
            },
            "sources": totals.record(),
            "round_trip": round_trip.summed(units.read_record(self._out, name)["round_trip"] for name in names),
            "left_out": dict(sorted(self._left_out.items())),
            "notes": self._notes,
            "units": len(names),
            "files": folder.hashes(self._out),
            "settings": {key: value for key, value in self._claim.items() if key != "version"},
        }

    def _report(self, manifest: Mapping[str, Any], reused: int) -> Report:
        counts = np.load(self._out / folder.STATISTICS)["counts"]
        share = counts[counts > 0] / counts.sum()
        documents, ours = manifest["documents"], usage()
        everyone = [ours, *self._pool.ended]
        self._clock.seconds["pipes"] = sum(self._pool.pipe_seconds.values())
        return Report(
            documents=documents["kept"],
            tokens=sum(split["tokens"] for split in manifest["splits"].values()),
            text_bytes=sum(split["bytes"] for split in manifest["splits"].values()),
            units=manifest["units"],
            units_reused=reused,
            unigram_nats=float(-(share * np.log(share)).sum()),
            documents_read=documents["read"],
            dropped=documents["dropped"],
            dropped_in_words=dropped_in_words({reason: documents["dropped"].get(reason, 0) for reason in REASONS}),
            warnings=warnings_of(manifest),
            workers=self._pool.workers,
            seconds=time.perf_counter() - self._began,
            cpu_seconds={**self._clock.seconds, "all": sum(used.seconds for used in everyone)},
            peak_memory_bytes=sum(used.memory for used in everyone),
            left_out=manifest["left_out"],
        )


def _first_bytes(texts: Iterator[tuple[bytes, bytes]], limit: int) -> Iterator[str]:
    seen = 0
    for text, _ in texts:
        yield text.decode()
        seen += len(text)
        if seen >= limit:
            return
