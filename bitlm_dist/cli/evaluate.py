"""The command `bitlm eval`, and the evaluator that training uses as well."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlm_dist.cli.console import (
    AsJson,
    Run,
    console,
    print_line,
    print_table,
    stderr_console,
)
from bitlm_dist.cli.trained_run import load_trained_config
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError, log_to_stderr, os_error_message
from bitlm_dist.evaluation.judgement import judge
from bitlm_dist.formatting import format_percent, format_value, plural, ratio_or_none
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.data.packed_dataset import PackedDataset
    from bitlm_dist.data_prep.token_bytes import ByteLengths
    from bitlm_dist.evaluation.likelihood import EvaluationReport
    from bitlm_dist.model.language_model import LanguageModel


@contextmanager
def open_evaluator(
    config: Config,
    split: str = "validation",
    *,
    is_training: bool = False,
    print_warning: bool = False,
    show_progress: bool = False,
) -> Iterator[Callable[["LanguageModel"], dict[str, Any]]]:
    """Open a split of the config's data for evaluation.

    Args:
        config: config with a ``data.path``.
        split: split to read.
        is_training: if the bytes counted contradict the manifest, continue and note it in the
            report; otherwise raise a UserError.
        print_warning: print the first note.
        show_progress: show a bar with the time left.

    Yields:
        A function that evaluates a model and returns its report. The field ``bytes_note`` says why
        bits per byte are not those of the text; None if they are. The field ``scored`` says which
        text was scored.
    """
    from bitlm_dist.data.packed_dataset import PackedDataset
    from bitlm_dist.data_prep.tokenizer import Tokenizer
    from bitlm_dist.evaluation.scored_data import data_fingerprint
    from bitlm_dist.evaluation.text_bytes import check_byte_count

    assert config.data.path is not None
    path = config.data.path
    byte_lengths = Tokenizer.from_folder(path / "tokenizer").byte_lengths
    dataset = PackedDataset.from_config(config, split)
    limit = config.evaluation.num_sequences
    is_full_split = not 0 < limit < len(dataset)

    def score(model: "LanguageModel") -> dict[str, Any]:
        """Evaluate a model and add ``bytes_note`` and ``scored`` to its report."""
        report = _score(model, dataset, byte_lengths, config, show_progress)

        # The manifest counts the bytes of the whole split: only a full evaluation is comparable.
        check = check_byte_count(path, dataset.manifest, split, report.bytes, is_full_split)
        if check.contradicts_manifest and not is_training:
            raise UserError(str(check.note))

        nonlocal print_warning
        if check.note and print_warning:
            print_line(f"warning: bits per byte are approximate: {check.note}")
            print_warning = False

        text = {"tokens": report.tokens, "bytes": report.bytes}
        scored_text = {**text, "data": data_fingerprint(dataset, limit)}
        return {**asdict(report), "bytes_note": check.note, "scored": scored_text}

    try:
        yield score
    finally:
        dataset.close()


def _score(
    model: "LanguageModel",
    dataset: "PackedDataset",
    byte_lengths: "ByteLengths",
    config: Config,
    show_progress: bool,
) -> "EvaluationReport":
    """Evaluate a model, with a bar if asked for."""
    from bitlm_dist.cli.progress import work_progress
    from bitlm_dist.evaluation.likelihood import evaluate

    limit = config.evaluation.num_sequences
    total = min(limit, len(dataset)) if limit else len(dataset)
    progress = (
        work_progress("evaluating", total, "sequences")
        if show_progress
        else nullcontext(lambda done: None)
    )
    with progress as advance:
        return evaluate(model, dataset, byte_lengths, config.evaluation, config.sampling, advance)


def eval_command(
    run: Run,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[--SECTION.KEY VALUE]…")] = None,
    split: Annotated[str, typer.Option(help="validation or train.")] = "validation",
    as_json: AsJson = False,
) -> None:
    """Evaluate a run on held-out text, and record the result in its evaluations.jsonl.

    Reports bits per byte (the bound and, if the head supports it, the chain rule), sanity checks,
    and the unigram entropy of the same text. Keys of evaluation, sampling, parallel and logging,
    data.path, the cache and model.backbone.attention can be overridden.
    """
    from bitlm_dist.checkpoint.steps import folder_of, read_train_state
    from bitlm_dist.cli.progress import work_progress
    from bitlm_dist.data.manifest import SPLITS
    from bitlm_dist.training.checkpoint_folder import CHECKPOINTS
    from bitlm_dist.training.trained_files import find_trained_steps

    # What only looks at files comes first: torch takes seconds to import.
    if split not in SPLITS:
        raise UserError(f"--split {split}: choose from {', '.join(SPLITS)}")
    config = load_trained_config(run, overrides or [], "eval")
    _check_data(run, config)
    step = find_trained_steps(run, config)[-1]

    if not as_json and not stderr_console.is_interactive:
        stderr_console.print(
            f"evaluating {run}, step {step}, on {config.data.path}, {split}",
            soft_wrap=True,
            markup=False,
        )
    with work_progress(f"loading {run}, step {step}"):
        from bitlm_dist.training.weights import load_trained_model

        _, model, step = load_trained_model(run, config)
        # Read now: a run that is still training may delete the checkpoint in the meantime.
        state = read_train_state(folder_of(run / CHECKPOINTS, step))
    with open_evaluator(config, split, show_progress=True) as score:
        report = score(model)

    _record(run, config, state, split, report)
    judgement = judge(report)
    if as_json:
        heading = {"run": str(run), "step": step, "split": split}
        print(to_json({**heading, **report, "judgement": judgement}))
        return
    _print_report(f"{run}, step {step}, {split}", report)
    print_line(judgement)


def _check_data(run: Path, config: Config) -> None:
    """Check that the config's data can be scored by the run's model.

    Raises:
        UserError: there are no data, or they have another tokenizer.
    """
    from bitlm_dist.data.manifest import read_manifest
    from bitlm_dist.data_prep.tokenizer import Tokenizer
    from bitlm_dist.training.trained_files import TOKENIZER

    if config.data.path is None:
        raise UserError("data.path is not set in the run's config: add --data.path FOLDER")
    manifest = read_manifest(config.data.path)

    # A run without a tokenizer is refused with all else that it may lack.
    folder = run / TOKENIZER
    if not folder.is_dir():
        return
    # The ids of another tokenizer are other tokens to this model.
    if manifest["tokenizer"]["fingerprint"] != Tokenizer.from_folder(folder).fingerprint:
        raise UserError(
            f"data.path = {config.data.path} has another tokenizer than {run}: "
            f"prepare it with {folder}'s file"
        )


def _record(
    run: Path, config: Config, state: Mapping[str, Any], split: str, report: Mapping[str, Any]
) -> None:
    """Append the report to the run's evaluations; a folder that cannot be written is no failure.

    Args:
        run: the run folder.
        config: the run's config, with overrides applied.
        state: training state of the checkpoint that was evaluated.
        split: the split that was scored.
        report: the evaluator's report.
    """
    from bitlm_dist.config_loading import flatten
    from bitlm_dist.training import evaluation_records

    progress = {name: state.get(name) for name in evaluation_records.PROGRESS_FIELDS}
    record = evaluation_records.evaluation_record(
        progress, report, evaluation_records.BY_EVAL, split
    )
    used = config.model_dump(mode="json", include={"evaluation", "sampling"})
    record["settings"] = dict(flatten(used))

    try:
        evaluation_records.append_evaluation(run, record)
    except OSError as error:
        log_to_stderr(f"warning: the evaluation is not recorded: {os_error_message(error)}")


def _print_report(title: str, report: Mapping[str, Any]) -> None:
    """Print a report as a table; rows without a value are left out."""
    per_byte = "approximate bits per byte" if report.get("bytes_note") else "bits per byte"
    kind = "exact" if report["exact"] else "upper bound"
    unigram = report["unigram_bits_per_byte"]
    chain = report["chain_bits_per_byte"]
    share = _format_share(report["bits_per_byte"], unigram)

    # Labels and values are short enough for 80 columns without a broken line.
    rows = [
        (
            f"{per_byte}, {kind}",
            f"{format_value(report['bits_per_byte'])} ± {format_value(report['bits_per_byte_se'])} "
            "(standard error)",
        ),
        # right below the bound that it is to be compared with
        *([(f"{per_byte}, chain rule", format_value(chain))] if chain is not None else []),
        (f"{per_byte}, unigrams", f"{format_value(unigram)} (unigram entropy: no context)"),
        (
            "share of the unigram entropy",
            share if chain is None else f"{share}, chain rule {_format_share(chain, unigram)}",
        ),
        (f"nats per token, {kind}", format_value(report["nats_per_token"])),
        (
            "context-shuffle delta",
            f"{format_value(report['context_shuffle_delta_nats'])} nats per token",
        ),
        ("invalid codes in samples", _format_share(report["invalid_code_rate"], 1.0)),
        ("scored", f"{plural(report['tokens'], 'token')}, {plural(report['bytes'], 'byte')}"),
    ]
    if report["brier"]:
        scores = "  ".join(f"{score:.2f}" for score in report["brier"])
        rows.append(("Brier-1, -2, … (100 is best)", scores))
    if report["accuracy_by_time"]:
        rows.append(("bits right at noise level t", _format_accuracies(report["accuracy_by_time"])))

    print_table(title, ("measure", "value"), rows)
    if report.get("bytes_note"):
        print_line(f"warning: bits per byte are approximate: {report['bytes_note']}")


def _format_share(value: float | None, reference: float | None) -> str:
    ratio = ratio_or_none(value, reference)
    return "–" if ratio is None else format_percent(ratio)


def _format_accuracies(accuracies: Mapping[str, float]) -> str:
    """Format pairs of time and accuracy, so many to a line that a table breaks no pair."""
    pairs = [f"{t}:{100 * accuracy:6.1f}%" for t, accuracy in accuracies.items()]
    per_line = 3 if console.width >= 80 else 1
    return "\n".join("  ".join(pairs[i : i + per_line]) for i in range(0, len(pairs), per_line))
