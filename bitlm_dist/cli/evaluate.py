"""The command `bitlm eval`, and the evaluator that training uses as well."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlm_dist import config_loading
from bitlm_dist.cli.console import AsJson, Run, print_line, print_table
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.formatting import format_value, ratio_or_none
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.model.language_model import LanguageModel


@contextmanager
def open_evaluator(
    config: Config,
    split: str = "validation",
    *,
    is_training: bool = False,
    print_warning: bool = False,
) -> Iterator[Callable[["LanguageModel"], dict[str, Any]]]:
    """Open a split of the config's data for evaluation.

    Args:
        config: config with a ``data.path``.
        split: split to read.
        is_training: if the bytes counted contradict the manifest, continue and note it in the
            report; otherwise raise a UserError.
        print_warning: print the first note.

    Yields:
        A function that evaluates a model and returns its report. The field ``bytes_note`` says why
        bits per byte are not those of the text; None if they are.
    """
    from bitlm_dist.data.packed_dataset import PackedDataset
    from bitlm_dist.data_prep.tokenizer import Tokenizer
    from bitlm_dist.evaluation.likelihood import evaluate as score
    from bitlm_dist.evaluation.text_bytes import check_byte_count

    assert config.data.path is not None
    path = config.data.path
    byte_lengths = Tokenizer.from_folder(path / "tokenizer").byte_lengths
    dataset = PackedDataset.from_config(config, split)

    def scored(model: "LanguageModel") -> dict[str, Any]:
        """Evaluate a model and add ``bytes_note`` to its report."""
        report = score(model, dataset, byte_lengths, config.evaluation, config.sampling)

        # The manifest counts the bytes of the whole split: only a full evaluation is comparable.
        is_full_split = not 0 < config.evaluation.num_sequences < len(dataset)
        check = check_byte_count(path, dataset.manifest, split, report.bytes, is_full_split)
        if check.contradicts_manifest and not is_training:
            raise UserError(str(check.note))

        nonlocal print_warning
        if check.note and print_warning:
            print_line(f"warning: bits per byte are approximate: {check.note}")
            print_warning = False

        return {**asdict(report), "bytes_note": check.note}

    try:
        yield scored
    finally:
        dataset.close()


def eval_command(
    run: Run,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[--SECTION.KEY VALUE]…")] = None,
    split: Annotated[str, typer.Option(help="validation or train.")] = "validation",
    as_json: AsJson = False,
) -> None:
    """Evaluate a run on held-out text.

    Reports bits per byte (the bound and, if the head supports it, the chain rule), sanity checks,
    and the unigram entropy of the same text.
    """
    from bitlm_dist.data.manifest import SPLITS, read_manifest
    from bitlm_dist.training.weights import load_trained_model

    if split not in SPLITS:
        raise UserError(f"--split {split}: choose from {', '.join(SPLITS)}")
    config = config_loading.load_run_config(run, overrides or [])
    if config.data.path is None:
        raise UserError("data.path is not set in the run's config: add --data.path FOLDER")

    folder, model, step = load_trained_model(run, config)

    # The ids of another tokenizer are other tokens to this model.
    if (
        read_manifest(config.data.path)["tokenizer"]["fingerprint"]
        != folder.tokenizer().fingerprint
    ):
        raise UserError(
            f"data.path = {config.data.path} has another tokenizer than {run}: "
            f"prepare it with {run}/tokenizer's file"
        )

    with open_evaluator(config, split) as score:
        report = score(model)

    if as_json:
        print(to_json({"run": str(run), "step": step, "split": split, **report}))
        return
    _print_report(f"{run}, step {step}, {split}", report)


def _print_report(title: str, report: Mapping[str, Any]) -> None:
    """Print a report as a table; rows without a value are left out."""
    ratio = ratio_or_none(report["bits_per_byte"], report["unigram_bits_per_byte"])
    per_byte = "approximate bits per byte" if report.get("bytes_note") else "bits per byte"
    rows = [
        (
            f"{per_byte} ({'exact' if report['exact'] else 'bound'} ± s.e.)",
            f"{format_value(report['bits_per_byte'])} ± {format_value(report['bits_per_byte_se'])}",
        ),
        (f"unigram entropy, {per_byte}", format_value(report["unigram_bits_per_byte"])),
        ("ratio to unigram entropy", format_value(ratio)),
        ("nats per token", format_value(report["nats_per_token"])),
        (
            "context-shuffle delta, nats per token",
            format_value(report["context_shuffle_delta_nats"]),
        ),
        ("invalid-code rate", format_value(report["invalid_code_rate"])),
        ("tokens, bytes", f"{report['tokens']:,}, {report['bytes']:,}"),
    ]

    # right below the bound that it is to be compared with
    if report["chain_bits_per_byte"] is not None:
        chain_rule = format_value(report["chain_bits_per_byte"])
        rows.insert(1, (f"{per_byte} (chain rule in the block)", chain_rule))
    if report["brier"]:
        scores = "  ".join(f"{score:.2f}" for score in report["brier"])
        rows.append(("Brier-1, -2, … of the next tokens", scores))
    accuracy = report["accuracy_by_time"].items()
    if accuracy:
        rows.append(("bit accuracy at t", "  ".join(f"{t}: {100 * a:.1f}%" for t, a in accuracy)))

    print_table(title, ("measure", "value"), rows)
    if report.get("bytes_note"):
        print_line(f"warning: bits per byte are approximate: {report['bytes_note']}")
