"""Manifest of a prepared folder, and the report of the call that prepared it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitlm_dist.data.manifest import MANIFEST_VERSION, SPLITS
from bitlm_dist.data_prep import output_dir, output_units, round_trip
from bitlm_dist.data_prep.pool import Pool
from bitlm_dist.data_prep.reading import CLEANING_CHANGES, DROP_REASONS
from bitlm_dist.data_prep.report import SourceCounts, drop_summary, tokenizer_warnings
from bitlm_dist.data_prep.stage_timer import StageTimer
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.data_prep.worker import process_usage


@dataclass(frozen=True)
class Report:
    """Result of a preparation.

    Attributes:
        documents: Documents kept.
        tokens: Tokens of all splits.
        text_bytes: UTF-8 bytes of all splits.
        units: Number of units.
        units_reused: Units that an earlier call had finished.
        unigram_nats: Entropy of the unigram distribution, nats per token.
        documents_read: Documents read, dropped ones included.
        dropped: Number of dropped documents by reason.
        dropped_in_words: The same as one line of text.
        warnings: Settings of the tokenizer's file that are not applied, and text that its tokens
            do not reproduce.
        workers: Number of workers.
        seconds: Wall time.
        cpu_seconds: By stage; ``all`` is the total of all processes.
        peak_memory_bytes: Sum of the peaks of all processes, an upper bound on the joint peak.
        left_out: Files in input folders that were not read, by reason.
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


def build_manifest(
    out: Path,
    tokenizer: Tokenizer,
    names: Sequence[str],
    splits: Mapping[str, Any],
    totals: SourceCounts,
    *,
    saved_settings: Mapping[str, Any],
    left_out: Mapping[str, int],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Build the manifest; it must not depend on time, workers or the location of the folder.

    Args:
        out: The prepared folder; every file but the manifest and report.md is final.
        tokenizer: The tokenizer that produced the units.
        names: Names of all units, in order.
        splits: Totals per split.
        totals: Counts by source.
        saved_settings: Settings that identify the folder.
        left_out: Files in input folders that were not read, by reason.
        notes: Remarks for report.md.
    """
    counts = totals.sum()
    # Documents without tokens show only in the units, after they were counted as kept.
    counts["no_tokens"] = sum(
        output_units.read_unit_record(out, name)["no_tokens"] for name in names
    )

    return {
        "version": MANIFEST_VERSION,
        "vocabulary": tokenizer.vocab_size,
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
            "dropped": {reason: counts[reason] for reason in DROP_REASONS if counts[reason]},
            "changed": {change: counts[change] for change in CLEANING_CHANGES if counts[change]},
        },
        "sources": totals.per_source(),
        "round_trip": round_trip.sum_results(
            output_units.read_unit_record(out, name)["round_trip"] for name in names
        ),
        "left_out": dict(sorted(left_out.items())),
        "notes": list(notes),
        "units": len(names),
        "files": output_dir.file_hashes(out),
        "settings": {key: value for key, value in saved_settings.items() if key != "version"},
    }


def build_report(
    out: Path,
    manifest: Mapping[str, Any],
    num_reused: int,
    pool: Pool,
    timer: StageTimer,
    seconds: float,
) -> Report:
    """Build the report of one call from the manifest and the resources used.

    Args:
        out: The prepared folder.
        manifest: Its manifest.
        num_reused: Number of units that an earlier call had finished.
        pool: Workers, already shut down.
        timer: CPU seconds by stage; receives those spent on handing tasks over.
        seconds: Wall time of the call.
    """
    counts = np.load(out / output_dir.STATISTICS_FILE)["counts"]
    # Tokens that do not occur contribute nothing to the entropy.
    probabilities = counts[counts > 0] / counts.sum()
    documents = manifest["documents"]

    local_usage = process_usage()
    all_usage = [local_usage, *pool.worker_usage]
    timer.seconds["pipes"] = sum(pool.pipe_seconds.values())

    return Report(
        documents=documents["kept"],
        tokens=sum(split["tokens"] for split in manifest["splits"].values()),
        text_bytes=sum(split["bytes"] for split in manifest["splits"].values()),
        units=manifest["units"],
        units_reused=num_reused,
        unigram_nats=float(-(probabilities * np.log(probabilities)).sum()),
        documents_read=documents["read"],
        dropped=documents["dropped"],
        dropped_in_words=drop_summary(
            {reason: documents["dropped"].get(reason, 0) for reason in DROP_REASONS}
        ),
        warnings=tokenizer_warnings(manifest),
        workers=pool.num_workers,
        seconds=seconds,
        cpu_seconds={**timer.seconds, "all": sum(used.cpu_seconds for used in all_usage)},
        peak_memory_bytes=sum(used.peak_memory_bytes for used in all_usage),
        left_out=manifest["left_out"],
    )
