"""The command `bitlm prep`."""

import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from bitlm_dist.cli.console import AsJson, console, path_expander, path_option, print_line
from bitlm_dist.errors import INTERRUPTED_EXIT_CODE, TERMINATED_EXIT_CODE, log_to_stderr
from bitlm_dist.formatting import plural
from bitlm_dist.processes import handling_signal
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.data_prep.progress import NotifyCallback, ProgressCallback
    from bitlm_dist.data_prep.settings import Settings
    from bitlm_dist.data_prep.summary import Report

READING_PANEL = "Reading documents"
FILTERS_PANEL = "Leaving documents out"
RUNNING_PANEL = "Running"

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
    str,
    typer.Option(
        help="JSON key or column of the text; a.b is key b of object a.",
        rich_help_panel=READING_PANEL,
    ),
]
DocumentSeparator = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=r"Separator of the documents in a .txt file; \n is a line break, \t a tab.",
        rich_help_panel=READING_PANEL,
    ),
]
OnError = Annotated[
    str,
    typer.Option(
        help="At an invalid line: stop, or skip and count it.", rich_help_panel=READING_PANEL
    ),
]
MaxUnpackRatio = Annotated[
    int,
    typer.Option(
        help="Maximum ratio of unpacked to compressed size, beyond 100 MB; 0: no limit.",
        rich_help_panel=READING_PANEL,
    ),
]
MinChars = Annotated[
    int,
    typer.Option(
        help="Drop documents with fewer characters.",
        rich_help_panel=FILTERS_PANEL,
    ),
]
MaxChars = Annotated[
    int,
    typer.Option(
        help="Drop documents with more characters; 0: no limit, so memory use has none either.",
        rich_help_panel=FILTERS_PANEL,
    ),
]
ExactDedup = Annotated[
    bool,
    typer.Option(help="Drop copies of earlier documents.", rich_help_panel=FILTERS_PANEL),
]
NearDedup = Annotated[
    float | None,
    typer.Option(
        help="Drop documents this similar (Jaccard) to an earlier one, e.g. 0.8.",
        rich_help_panel=FILTERS_PANEL,
    ),
]
Decontaminate = Annotated[
    list[Path] | None,
    path_option(
        "--decontaminate",
        "Evaluation text that must not be trained on; may be repeated.",
        "FILE",
        FILTERS_PANEL,
    ),
]
HitRatio = Annotated[
    float,
    typer.Option(
        help="Drop a document if at least this fraction of its 13-grams is in the evaluation text.",
        rich_help_panel=FILTERS_PANEL,
    ),
]
Language = Annotated[
    str | None,
    typer.Option(
        help="Keep only documents in this language, e.g. en.", rich_help_panel=FILTERS_PANEL
    ),
]
LanguageProbability = Annotated[
    float,
    typer.Option(help="Minimum probability of the language.", rich_help_panel=FILTERS_PANEL),
]
UnitMb = Annotated[
    int,
    typer.Option(
        help="Megabytes of text per unit of output, one shard or more; raise it for terabytes.",
        rich_help_panel=RUNNING_PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Worker processes; default: one per usable CPU.", rich_help_panel=RUNNING_PANEL
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print nothing.", rich_help_panel=RUNNING_PANEL)
]


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
    silent = quiet or as_json
    if not silent:
        print_line(f"preparing {_name_sources(sources)} into {out}")

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
    report = _prepare(sources, tokenizer, out, validation, settings, workers, silent)
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

    def run(observe: "ProgressCallback | None", notify: "NotifyCallback") -> "Report":
        return prepare(sources, tokenizer, out, validation, settings, processes, observe, notify)

    try:
        with handling_signal(signal.SIGTERM, _terminate):
            if silent:
                return run(None, lambda line: None)
            with preparation_progress(console) as observe:
                return run(observe, print_line)
    except (KeyboardInterrupt, _Terminated) as request:
        _exit_unfinished(out, is_interrupted=isinstance(request, KeyboardInterrupt))


class _Terminated(BaseException):
    """SIGTERM. Derives from BaseException so that no ``except Exception`` swallows it."""


def _terminate(number: int, frame: object) -> NoReturn:
    """Handle SIGTERM by an exception, so that the workers end and temporary files go."""
    raise _Terminated


def _exit_unfinished(out: Path, is_interrupted: bool) -> NoReturn:
    """Say what an interrupted preparation left, and exit."""
    from bitlm_dist.data.manifest import MANIFEST
    from bitlm_dist.data_prep.output_dir import SETTINGS_FILE

    # The units that were finished are on disk and will be reused.
    if (out / MANIFEST).is_file():
        log_to_stderr(f"{out} is complete, as it was")
    elif (out / SETTINGS_FILE).is_file():
        log_to_stderr(f"{out} is not finished: the same command goes on from there")
    elif not is_interrupted:
        log_to_stderr("terminated before anything was written")
    raise typer.Exit(INTERRUPTED_EXIT_CODE if is_interrupted else TERMINATED_EXIT_CODE) from None


def _name_sources(sources: Sequence[str]) -> str:
    """Name the first source, without a URL's query, which may hold a key."""
    first = sources[0].partition("?")[0] if "://" in sources[0] else sources[0]
    others = len(sources) - 1
    return f"{first} and {plural(others, 'other')}" if others else first


def _print_report(out: Path, report: "Report") -> None:
    size = report.text_bytes
    text = f"{size / 1e6:,.1f} MB" if size >= 1e6 else plural(size, "byte")
    reused = f" ({report.units_reused:,} there before)" if report.units_reused else ""
    print_line(
        f"{out}: {plural(report.documents, 'document')}, {plural(report.tokens, 'token')}, "
        f"{text} of text in {plural(report.units, 'unit')}{reused}"
    )
    print_line(
        f"dropped: {report.dropped_in_words}; "
        f"unigram entropy {abs(report.unigram_nats):.3f} nats per token"
    )
    for warning in report.warnings:
        print_line(f"warning: {warning}")
    _print_next(out)


def _print_next(out: Path) -> None:
    """Print the command that trains on ``out``, in one piece, as it will be copied."""
    folder = shlex.quote(str(out))
    run_dir = shlex.quote(f"runs/{out.absolute().name}")
    text = f"next: bitlm train quickstart --data.path {folder} --run.dir {run_dir}"
    console.print(text, soft_wrap=True, markup=False)
