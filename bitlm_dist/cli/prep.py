"""The command `bitlm prep`."""

import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitlm_dist.cli.console import AsJson, console, path_expander, path_option, print_line
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.data_prep.settings import Settings
    from bitlm_dist.data_prep.summary import Report

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE|DIR|URL…",
        help=".txt, .jsonl, .ndjson, .json, .csv, .tsv or .parquet, plain or .gz, .bz2, .xz, .zst; "
        "paths, or s3://, gs://, https://…",
    ),
]
TokenizerName = Annotated[
    str,
    typer.Option(
        help="tokenizer.json, .tiktoken, tekken or SentencePiece .model file, a folder with "
        "one, package:NAME:FILE, or bpe:SIZE to train one."
    ),
]
Out = Annotated[Path, path_option("--out", "Folder to write.", "DIR")]
Validation = Annotated[
    float, typer.Option(help="Fraction of documents to hold out; of a single document, its end.")
]
TextField = Annotated[
    str, typer.Option(help="JSON key or column of the text; a.b is key b of object a.")
]
DocumentSeparator = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=r"Separator of the documents in a .txt file; \n is a line break, \t a tab.",
    ),
]
MinChars = Annotated[int, typer.Option(help="Drop documents with fewer characters.")]
MaxChars = Annotated[
    int,
    typer.Option(
        help="Drop documents with more characters; 0: no limit, so memory use has none either."
    ),
]
ExactDedup = Annotated[bool, typer.Option(help="Drop copies of earlier documents.")]
NearDedup = Annotated[
    float | None,
    typer.Option(help="Drop documents this similar (Jaccard) to an earlier one, e.g. 0.8."),
]
Decontaminate = Annotated[
    list[Path] | None,
    path_option(
        "--decontaminate", "Evaluation text that must not be trained on; may be repeated.", "FILE"
    ),
]
HitRatio = Annotated[
    float,
    typer.Option(
        help="Drop a document if at least this fraction of its 13-grams is in the evaluation text."
    ),
]
Language = Annotated[
    str | None, typer.Option(help="Keep only documents in this language, e.g. en.")
]
LanguageProbability = Annotated[float, typer.Option(help="Minimum probability of the language.")]
OnError = Annotated[str, typer.Option(help="At an invalid line: stop, or skip and count it.")]
UnitMb = Annotated[
    int,
    typer.Option(
        help="Megabytes of text per unit of output, one shard or more; raise it for terabytes."
    ),
]
MaxUnpackRatio = Annotated[
    int,
    typer.Option(help="Maximum ratio of unpacked to compressed size, beyond 100 MB; 0: no limit."),
]
Workers = Annotated[int | None, typer.Option(help="Worker processes; default: one per usable CPU.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing.")]


def prep_command(
    sources: Sources,
    tokenizer: TokenizerName,
    out: Out,
    validation: Validation = 0.05,
    field: TextField = "text",
    document_separator: DocumentSeparator = None,
    min_chars: MinChars = 1,
    max_chars: MaxChars = 5_000_000,
    exact_dedup: ExactDedup = True,
    near_dedup: NearDedup = None,
    decontaminate: Decontaminate = None,
    hit_ratio: HitRatio = 0.1,
    language: Language = None,
    language_probability: LanguageProbability = 0.5,
    on_error: OnError = "stop",
    unit_mb: UnitMb = 2,
    max_unpack_ratio: MaxUnpackRatio = 200,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Clean, deduplicate and tokenize text, and write it as shards.

    After an interruption the same command continues where it stopped.
    """
    # Must precede the import of numpy, whose own threads would compete with the workers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from bitlm_dist.data_prep.settings import Settings

    settings = Settings(
        field,
        min_chars,
        max_chars,
        exact_dedup,
        near_dedup,
        tuple(decontaminate or ()),
        hit_ratio,
        language,
        language_probability,
        on_error,
        unit_mb,
        document_separator and document_separator.replace(r"\n", "\n").replace(r"\t", "\t"),
        max_unpack_ratio,
    )
    report = _prepare(
        sources, tokenizer, out, validation, settings, workers, silent=quiet or as_json
    )
    if as_json:
        print(to_json(asdict(report)))
    elif not quiet:
        _print_report(out, report)


def _prepare(
    sources: list[str],
    tokenizer: str,
    out: Path,
    validation: float,
    settings: "Settings",
    workers: int | None,
    silent: bool,
) -> "Report":
    """Prepare the sources, showing progress unless ``silent``."""
    from bitlm_dist.cli.prep_progress import preparation_progress
    from bitlm_dist.data_prep.prepare import prepare

    sources = [
        source if "://" in source else path_expander("FILE|DIR")(source) for source in sources
    ]
    tokenizer = path_expander("--tokenizer")(tokenizer)
    processes = len(os.sched_getaffinity(0)) if workers is None else workers

    try:
        with ExitStack() as stack:
            observe = None if silent else stack.enter_context(preparation_progress(console))
            notice = (lambda line: None) if silent else print_line
            return prepare(
                sources, tokenizer, out, validation, settings, processes, observe, notice
            )
    except KeyboardInterrupt:
        # the units that were finished are on disk and will be reused
        print_line(f"{out} is not finished: the same command goes on from there")
        raise typer.Exit(130) from None


def _print_report(out: Path, report: "Report") -> None:
    print_line(
        f"{out}: {report.documents:,} documents, {report.tokens:,} tokens, "
        f"{report.text_bytes / 1e6:.1f} MB of text in {report.units} units "
        f"({report.units_reused} were there); "
        f"unigram entropy {report.unigram_nats:.3f} nats per token; "
        f"dropped: {report.dropped_in_words}"
    )
    for warning in report.warnings:
        print_line(f"warning: {warning}")
