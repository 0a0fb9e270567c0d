"""The command `bitlm doctor`: its findings, or with --accept the acceptance run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitlm_dist.cli.console import AsJson, path_option, print_line
from bitlm_dist.errors import UserError

if TYPE_CHECKING:
    from bitlm_dist.acceptance.report import CheckResult

DEVICES = ("gpu", "cpu")


def doctor_command(
    accept: Annotated[
        Path | None,
        path_option(
            "--accept",
            "Check everything on this machine's cards; write gpu-CARD.md and .json here.",
            "OUT",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="gpu|cpu", help="With --accept: cpu tests the script itself at tiny sizes."
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(help="With --accept: card whose peak MFU refers to; default: the one found."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print versions, the device, and the backends found.

    With --accept OUT, run kernels, training, resume, generation and tests for at most 10 minutes
    (15 on several cards) and write a page. Exit code 1 if a check failed.
    """
    if accept is None:
        for option, value in (("--device", device), ("--card", card)):
            if value is not None:
                raise UserError(f"{option} belongs to --accept: add --accept OUT")
        from bitlm_dist.cli.doctor import print_findings

        print_findings(as_json)
        return

    if device not in (None, *DEVICES):
        raise UserError(f"--device {device}: choose from {', '.join(DEVICES)}")
    _accept(accept, device or "gpu", None if card is None else _peak_flops(card), as_json)


def _accept(out: Path, device: str, peak_flops: float | None, as_json: bool) -> None:
    from bitlm_dist.acceptance.run import accept
    from bitlm_dist.cli.progress import work_progress

    def print_result(result: "CheckResult") -> None:
        if not as_json:
            print_line(f"{result.name:<30} {result.seconds:6.1f} s  {result.line}")

    report = accept(
        out,
        device,
        peak_flops,
        # without a thread, as processes are started meanwhile
        lambda what: work_progress(what, animated=False),
        print_result,
    )
    if as_json:
        print(report.to_json())
    else:
        print_line(f"the page is in {report.page(out)}")
    if report.has_failed:
        raise typer.Exit(1)


def _peak_flops(card: str) -> float:
    """bf16 peak of a named card.

    Raises:
        UserError: no peak is known for it; lists the known cards.
    """
    from bitlm_dist.planning.flops import PEAK_FLOPS, peak_flops_of

    peak = peak_flops_of(card)
    if peak is None:
        raise UserError(f"--card {card}: unknown card; known are {', '.join(PEAK_FLOPS)}")
    return peak
