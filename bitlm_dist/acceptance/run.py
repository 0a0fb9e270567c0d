"""The acceptance run: all checks, one after the other, whatever fails."""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from bitlm_dist.acceptance.checks import Check, all_checks
from bitlm_dist.acceptance.commands import CheckFailedError, CheckSkippedError, Commands
from bitlm_dist.acceptance.context import Context
from bitlm_dist.acceptance.report import CheckResult, Report, State, Status
from bitlm_dist.acceptance.sizes import SIZES
from bitlm_dist.data.stale_resources import owner_tagged_name, remove_stale_resources
from bitlm_dist.errors import TERMINATED_EXIT_CODE, USER_ERROR_EXIT_CODE, UserError
from bitlm_dist.processes import handling_signal

MACHINE_SECONDS = 120.0  # for a driver that starts slowly
Show = Callable[[str], AbstractContextManager[Any]]


def accept(
    out: Path,
    device: str,
    peak_flops: float | None,
    show: Show,
    report_result: Callable[[CheckResult], None],
) -> Report:
    """Make all checks and write gpu-CARD.md and gpu-CARD.json to a folder after each of them.

    Args:
        out: the folder; created.
        device: ``gpu``, or ``cpu`` for tiny sizes.
        peak_flops: FLOP/s that MFU refers to; None: those of the card found.
        show: shows what is done while it lasts.
        report_result: called with each result.

    Raises:
        UserError: there is no GPU, or the folder cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--accept {out} is a file: name a folder")

    # the folder of data and runs is on the disk that the user has named
    sizes = SIZES[device]
    with handling_signal(signal.SIGTERM, _terminate), show("looking at the machine"):
        machine = describe_machine(device)
    if peak_flops is not None:
        machine["peak_flops"] = peak_flops

    out.mkdir(parents=True, exist_ok=True)
    remove_stale_resources(out)
    with handling_signal(signal.SIGTERM, _terminate), _work_folder(out) as folder:
        commands = Commands(folder, _environment(device))
        context = Context(sizes, machine, folder, commands)
        limit = sizes.total_seconds[machine["num_cards"] > 1]
        return run_checks(
            all_checks(context), context, Report(machine), out, limit, show, report_result
        )


def run_checks(
    checks: Sequence[Check],
    context: Context,
    report: Report,
    out: Path,
    seconds: float,
    show: Show,
    report_result: Callable[[CheckResult], None],
) -> Report:
    """Make checks within a limit, and save the report after each; Ctrl-C leaves it incomplete."""
    end = time.monotonic() + seconds
    report.save(out)
    try:
        for check in checks:
            with show(check.name):
                result = run_check(check, context, end)
            report.results.append(result)
            report.save(out)
            report_result(result)
        report.state = State.COMPLETE
    except BaseException:
        report.state = State.INTERRUPTED
        raise
    finally:
        report.save(out)
    return report


def run_check(check: Check, context: Context, end: float) -> CheckResult:
    """Make one check, until its limit or the end of the whole run."""
    start = time.monotonic()
    if start >= end:
        return CheckResult(check.name, Status.SKIPPED, 0.0, "no time was left")

    context.commands.deadline = min(start + context.sizes.patience * check.seconds, end)
    status = Status.DONE
    reason = ""
    output = ""
    numbers: dict[str, Any] = {}
    try:
        numbers = check.run(context)
    except CheckSkippedError as error:
        status = Status.SKIPPED
        reason = str(error)
    except CheckFailedError as error:
        status = Status.FAILED
        reason = str(error)
        output = error.output
    except Exception as error:  # whatever a check has not foreseen must not end the others
        status = Status.FAILED
        reason = f"{type(error).__name__}: {error}"

    seconds = time.monotonic() - start
    return CheckResult(check.name, status, seconds, " ".join(reason.split()), numbers, output)


def describe_machine(device: str) -> dict[str, Any]:
    """Describe the machine in a process of its own.

    Raises:
        UserError: there is no GPU where one is asked for, or the driver does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="bitlm-accept-") as folder:
        commands = Commands(Path(folder), _environment(device))
        commands.deadline = time.monotonic() + MACHINE_SECONDS
        try:
            machine: dict[str, Any] = commands.module("machine", device)
        except CheckFailedError as error:
            if error.code == USER_ERROR_EXIT_CODE:
                raise UserError(str(error)) from None
            raise UserError(f"the machine cannot be described: {error}") from None
    return machine


def _environment(device: str) -> dict[str, str]:
    """Variables of all commands: this environment's programs (ninja), and no GPU on a CPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"PATH": path, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder for data and runs, removed at the end; another start removes that of a dead one."""
    folder = out / owner_tagged_name("accept")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM: end the run with all clean-up, as Ctrl-C does."""
    sys.exit(TERMINATED_EXIT_CODE)
