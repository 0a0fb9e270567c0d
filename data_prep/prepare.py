"""`bitlm prep`: turn text into a folder of MDS shards that training reads.

Files are cut into chunks (sources.py), which workers parse, clean and filter (reading.py). The main
process drops duplicates in corpus order (deduplication.py) and groups the kept documents into units
of a few megabytes, which workers tokenize and write (output_units.py).

The folder is a function of the text and the settings alone: a rerun after a kill skips the units
that exist and produces the same files, byte for byte. A finished folder holds::

    manifest.json            counts, tokenizer, settings, hashes; written last, marks it complete
    report.md                one page: documents read and kept, and why the others were dropped
    settings.json            settings of the call that created the folder; later calls must agree
    tokenizer/               the tokenizer's files
    statistics.npz           token counts and context vectors of the training split, from which
                             codes are made, and bytes per token
    units/NNNNN-KEY.json     record of one unit
    train/index.json         one index over all units
    train/lengths.npy        tokens per document
    train/NNNNN-KEY/         shards of one unit, zstd, with hashes
    validation/              the same for held-out documents
"""

import hashlib
import itertools
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitlm_dist.data.manifest import MANIFEST, MANIFEST_VERSION
from bitlm_dist.data_prep import mds, output_dir, output_units, sources
from bitlm_dist.data_prep.bpe_training import requested_bpe_size, train_bpe_in_child
from bitlm_dist.data_prep.corpus_statistics import write_statistics
from bitlm_dist.data_prep.deduplication import Deduplicator
from bitlm_dist.data_prep.input_files import InputFile, find_files, left_out_summary, without_query
from bitlm_dist.data_prep.output_units import Unit
from bitlm_dist.data_prep.pool import Pool
from bitlm_dist.data_prep.progress import NotifyCallback, Progress, ProgressCallback
from bitlm_dist.data_prep.report import (
    SourceCounts,
    drop_remedy,
    drop_summary,
    render_markdown,
)
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.single_document import validation_offset
from bitlm_dist.data_prep.stage_timer import StageTimer
from bitlm_dist.data_prep.summary import Report, build_manifest, build_report
from bitlm_dist.data_prep.tokenizer import TOKENIZER_DIR, Tokenizer, find_tokenizer
from bitlm_dist.data_prep.worker import Job
from bitlm_dist.errors import UserError
from bitlm_dist.files import fsync_tree, write_atomically
from bitlm_dist.formatting import format_percent, plural
from bitlm_dist.strict_json import to_json

# Phases of a preparation, as the user sees them; training a BPE is another one, between the two.
READING = "reading"
TOKENIZING = "tokenizing"
FINISHING = "finishing"


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str,
    out: Path,
    validation_fraction: float = 0.05,
    settings: Settings | None = None,
    num_workers: int = 1,
    on_progress: ProgressCallback | None = None,
    notify: NotifyCallback = lambda line: None,
) -> Report:
    """Write the shards of ``inputs`` to ``out``; a rerun does only what is missing.

    Args:
        inputs: Files, folders or fsspec URLs, see :mod:`bitlm_dist.data_prep.input_files`.
        tokenizer: A file, a folder that holds one, ``package:DISTRIBUTION:FILE``, or ``bpe:SIZE``
            to train a byte-level BPE on the kept documents.
        out: Output folder; new, or created by a call with the same settings.
        validation_fraction: Fraction of documents to hold out, chosen by a hash of their text; of
            a single document, the fraction at its end.
        settings: Settings that decide which documents are kept.
        num_workers: Processes that read and tokenize; the output does not depend on it.
        on_progress: Called when a phase begins, and after each chunk or unit.
        notify: Called with each message for the user, e.g. about files that are left out.

    Raises:
        UserError: An input, the tokenizer, a setting or ``out`` is invalid. Finished units are
            kept; nothing else that existed before is changed.
    """
    settings = settings or Settings()
    settings.check()
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation {validation_fraction}: expected a share from 0 to below 1")
    if num_workers < 1:
        raise UserError(f"--workers {num_workers}: expected at least 1")

    left_out: Counter[str] = Counter()
    files = find_files(inputs, left_out)
    if left_out:
        notify(left_out_summary(left_out))

    # A bad tokenizer must fail before anything is written.
    existing_tokenizer = _load_tokenizer(tokenizer)
    saved_settings = _settings_to_save(
        existing_tokenizer, tokenizer, validation_fraction, files, settings
    )
    with (
        output_dir.acquired(out, saved_settings) as work_dir,
        Pool(_limit_workers(num_workers, files), Job(settings, out, validation_fraction)) as pool,
    ):
        return _Preparation(
            list(map(str, inputs)),
            files,
            left_out,
            saved_settings,
            out,
            work_dir,
            pool,
            on_progress,
            notify,
        ).run(tokenizer, existing_tokenizer)


def _settings_to_save(
    existing_tokenizer: Tokenizer | None,
    tokenizer_name: str,
    validation_fraction: float,
    files: Sequence[InputFile],
    settings: Settings,
) -> dict[str, Any]:
    """Settings that identify the output folder; a later call must have the same."""
    # The names of the inputs, not their contents: changed text replaces the units it affects.
    names = hashlib.sha256("\n".join(file.name for file in files).encode()).hexdigest()[:16]
    return {
        "version": MANIFEST_VERSION,
        "tokenizer": f"{existing_tokenizer.file.name} {existing_tokenizer.fingerprint[:16]}"
        if existing_tokenizer
        else tokenizer_name,
        "validation": validation_fraction,
        "inputs": f"{len(files)} files, names {names}",
        **settings.to_dict(),
    }


def _limit_workers(num_workers: int, files: Sequence[InputFile]) -> int:
    """Limit the number of workers to the number of full chunks, if the sizes are known."""
    if not all(file.size for file in files):
        return num_workers
    return min(num_workers, max(1, sum(file.size for file in files) // sources.CHUNK_BYTES))


def _load_tokenizer(name: str) -> Tokenizer | None:
    """Load the tokenizer called ``name``, or return None if it is yet to be trained."""
    return None if requested_bpe_size(name) else Tokenizer(find_tokenizer(name))


class _Preparation:
    """One call of :func:`prepare`, in an output folder that it has locked."""

    def __init__(
        self,
        inputs: list[str],
        files: Sequence[InputFile],
        left_out: Counter[str],
        saved_settings: Mapping[str, Any],
        out: Path,
        work_dir: Path,
        pool: Pool,
        on_progress: ProgressCallback | None,
        notify: NotifyCallback,
    ) -> None:
        self._inputs = inputs
        self._files = files
        self._left_out = left_out
        self._saved_settings = saved_settings
        self._out = out
        self._work_dir = work_dir
        self._pool = pool
        self._on_progress = on_progress
        self._notify = notify

        self._settings = pool.job.settings
        self._validation_fraction = pool.job.validation_fraction
        # Servers may not report the size of a file.
        self._total_bytes = sum(file.size for file in files) if all(f.size for f in files) else 0
        # What was read in the current phase, up to the end of a chunk.
        self._position = Progress(READING)
        # Remarks for report.md.
        self._notes: list[str] = []
        self._timer = StageTimer()
        self._start_time = time.perf_counter()

    def run(self, tokenizer_name: str, existing_tokenizer: Tokenizer | None) -> Report:
        """Run all steps in order; each skips work that an earlier call finished."""
        tokenizer = self._build_tokenizer(tokenizer_name, existing_tokenizer)
        self._note_vocab_size(tokenizer, requested_bpe_size(tokenizer_name))
        self._pool.set_tokenizer(tokenizer)

        totals = SourceCounts(self._inputs)
        names, num_reused = self._write_units(tokenizer, totals)
        if not names:
            counts = totals.sum()
            raise UserError(
                f"{', '.join(map(without_query, self._inputs))}: no document is left; "
                f"dropped: {drop_summary(counts)}{drop_remedy(counts)}"
            )

        self._report(Progress(FINISHING))
        with self._timer("index"):
            splits = self._merge_units(names)
        self._note_missing_validation(splits)
        with self._timer("statistics"):
            write_statistics(self._out, names, tokenizer, self._pool, self._timer)

        # The workers report the resources they used when they end.
        self._pool.shut_down()

        manifest = build_manifest(
            self._out,
            tokenizer,
            names,
            splits,
            totals,
            saved_settings=self._saved_settings,
            left_out=self._left_out,
            notes=self._notes,
        )
        with self._timer("index"):
            (self._out / output_dir.REPORT_FILE).write_text(
                render_markdown(manifest), encoding="utf-8"
            )
            # The manifest vouches for every other file, so these must reach the disk first.
            output_dir.sync_filesystem(self._out)
            write_atomically(self._out / MANIFEST, to_json(manifest, indent=1) + "\n")

        seconds = time.perf_counter() - self._start_time
        return build_report(self._out, manifest, num_reused, self._pool, self._timer, seconds)

    def _build_tokenizer(self, name: str, existing_tokenizer: Tokenizer | None) -> Tokenizer:
        """Copy or train the tokenizer into the folder, unless it is already there."""
        # The folder's settings name the same tokenizer, so one that is already there is reused.
        tokenizer_dir = self._out / TOKENIZER_DIR
        if tokenizer_dir.is_dir():
            return existing_tokenizer or Tokenizer.from_folder(tokenizer_dir)

        building = self._out / f".{TOKENIZER_DIR}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        if existing_tokenizer:
            existing_tokenizer.save(building)
        else:
            self._train_tokenizer(name, building / "tokenizer.json")

        # Renamed once it is complete: a kill leaves no partial tokenizer.
        fsync_tree(building)
        building.rename(tokenizer_dir)
        return existing_tokenizer or Tokenizer.from_folder(tokenizer_dir)

    def _train_tokenizer(self, name: str, file: Path) -> None:
        """Train the BPE called ``name`` on the kept documents."""
        vocab_size = requested_bpe_size(name)
        assert vocab_size is not None

        usage = train_bpe_in_child(
            (text for text, _ in self._kept_documents(SourceCounts(self._inputs), READING)),
            vocab_size,
            file,
            lambda: self._report(Progress(f"training {name}")),
        )
        self._pool.worker_usage.append(usage)

    def _note_vocab_size(self, tokenizer: Tokenizer, requested: int | None) -> None:
        """Tell that a BPE came out smaller than requested."""
        if requested is not None and tokenizer.vocab_size < requested:
            self._add_note(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, not {requested:,}: "
                "the text has no more pairs to merge"
            )

    def _report(self, progress: Progress) -> None:
        if self._on_progress:
            self._on_progress(progress)

    def _kept_documents(self, totals: SourceCounts, phase: str) -> Iterator[tuple[bytes, bytes]]:
        """Yield (text, SHA-256) of the kept documents in corpus order, counting in ``totals``."""
        # Training a BPE reads the corpus once more; each pass needs an empty index.
        deduplicator = Deduplicator(
            self._work_dir / phase, self._settings.exact_dedup, self._settings.near_dedup
        )

        self._position = Progress(phase, total=self._total_bytes)
        self._report(self._position)
        for future in self._batches_in_order():
            batch = future.result()
            self._timer.add(batch.seconds)
            with self._timer("deduplicate"):
                reasons = deduplicator.drop_reasons(batch.hashes, batch.signatures)

            totals.add(batch, reasons)
            for text, text_hash, reason in zip(batch.texts, batch.hashes, reasons, strict=True):
                if not reason:
                    yield text, text_hash

            # Raised only now, so that a rerun can reuse the units of documents before the bad line.
            if batch.error:
                raise UserError(batch.error)
            self._position = replace(
                self._position,
                done=batch.corpus_offset,
                text_bytes=self._position.text_bytes + sum(map(len, batch.texts)),
                num_documents=self._position.num_documents + batch.counts["read"],
            )
            # Tokenizing takes most of the time, so that phase is as far as its units are.
            if phase == READING:
                self._report(self._position)

    def _batches_in_order(self) -> "Iterator[Future[Any]]":
        """Submit chunks and yield their futures in corpus order, keeping all workers busy."""
        waiting: deque[Future[Any]] = deque()
        chunks = sources.iter_chunks(self._files, self._settings)
        while True:
            with self._timer("open"):
                chunk = next(chunks, None)
            if chunk is not None:
                waiting.append(self._pool.submit(chunk))

            if len(waiting) > self._pool.max_in_flight or (chunk is None and waiting):
                yield waiting.popleft()
            elif chunk is None:
                return

    def _write_units(self, tokenizer: Tokenizer, totals: SourceCounts) -> tuple[list[str], int]:
        """Write the units that do not exist yet.

        Returns:
            The names of all units, and the number of those that already existed.
        """
        names: list[str] = []
        waiting: deque[tuple[Future[Any], Progress]] = deque()
        num_reused = 0
        # Everything besides the documents that decides the bytes of a unit.
        key = to_json(
            [
                tokenizer.fingerprint,
                self._validation_fraction,
                mds.ZSTD_LEVEL,
                self._pool.job.settings.to_dict(),
            ]
        )

        for unit in self._split_into_units(self._kept_documents(totals, TOKENIZING), key):
            names.append(unit.name)
            if output_units.is_done(self._out, unit.name):
                num_reused += 1
                # Units are reported in order.
                if not waiting:
                    self._report(self._position)
                continue

            # A manifest marks a folder as complete, which this one no longer is.
            (self._out / MANIFEST).unlink(missing_ok=True)
            waiting.append((self._pool.submit(unit), self._position))

            # Bounds the number of units in memory.
            while len(waiting) > self._pool.max_in_flight or (waiting and waiting[0][0].done()):
                self._finish_unit(*waiting.popleft())

        for future, position in waiting:
            self._finish_unit(future, position)
        self._report(self._position)
        return names, num_reused

    def _finish_unit(self, future: "Future[Any]", position: Progress) -> None:
        """Wait for a unit, and report that all before ``position`` is tokenized."""
        self._timer.add(future.result())
        self._report(position)

    def _split_into_units(
        self, documents: Iterator[tuple[bytes, bytes]], key: str
    ) -> Iterator[Unit]:
        """Group documents into units; the end of a single document becomes the validation split."""
        # Reading two documents is enough to tell whether the corpus is a single one.
        first = list(itertools.islice(documents, 2))
        if len(first) > 1 or not first or not self._validation_fraction:
            yield from output_units.split_into_units(
                itertools.chain(first, documents),
                self._settings.unit_mb * output_units.MEGABYTE,
                key,
            )
            return

        text = first[0][0]
        unit = output_units.single_document_unit(
            text, validation_offset(text, self._validation_fraction), key
        )
        held_out = sum(len(unit.texts[i]) for i in unit.validation_indices or ())

        self._add_note(
            f"the corpus is one document: its last {format_percent(held_out / len(text))} "
            f"({plural(held_out, 'byte')}) are the validation split"
            if held_out
            else "the corpus is one document, too short to hold out a part of it: "
            "there is no validation split"
        )
        yield unit

    def _note_missing_validation(self, splits: Mapping[str, Mapping[str, int]]) -> None:
        """Tell that evaluation will have nothing to read, although a part was to be held out."""
        train = splits["train"]["documents"]
        # A single document has a note of its own.
        if self._validation_fraction and not splits["validation"]["documents"] and train > 1:
            self._add_note(
                f"none of {plural(train, 'document')} fell into the validation split: "
                "raise --validation or give more documents, or there is nothing to evaluate on"
            )

    def _add_note(self, note: str) -> None:
        """Tell the user something that report.md holds, too."""
        self._notes.append(note)
        self._notify(note)

    def _merge_units(self, names: Sequence[str]) -> dict[str, dict[str, int]]:
        """Write the indices over all units, and remove units whose text has changed since.

        Returns:
            Totals per split.
        """
        # An existing manifest still counts the stale units.
        if output_units.stale_units(self._out, names):
            (self._out / MANIFEST).unlink(missing_ok=True)

        splits = output_dir.merge_units(self._out, names)
        if not splits["train"]["documents"]:
            raise UserError(
                f"{self._out}: every document fell into the validation split: "
                "lower --validation or give more documents"
            )

        output_units.remove_stale_units(self._out, names)
        return splits
