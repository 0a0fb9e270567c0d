"""Order, limits and failures, with small checks in place of the real ones."""

import json
import os
import sys
import time
from contextlib import nullcontext

import pytest

from bitlm_dist.acceptance.checks import Check
from bitlm_dist.acceptance.commands import CheckFailedError, CheckSkippedError, Commands
from bitlm_dist.acceptance.context import Context
from bitlm_dist.acceptance.report import Report, State, Status
from bitlm_dist.acceptance.run import run_check, run_checks
from bitlm_dist.acceptance.sizes import SIZES

MACHINE = {
    "card": "cpu",
    "num_cards": 1,
    "memory_bytes": None,
    "peak_flops": None,
    "driver": None,
    "cuda": None,
    "python": "3",
    "packages": {},
    "commit": None,
    "changed": False,
}


@pytest.fixture
def context(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return Context(SIZES["gpu"], MACHINE, folder, Commands(folder, {}))


def python(code):
    """A check that runs a line of Python in a process."""
    return lambda context: {"out": context.commands.run([sys.executable, "-c", code], {})}


def made(checks, context, out, seconds=60.0):
    report = Report(MACHINE)
    run_checks(checks, context, report, out, seconds, nullcontext, lambda result: None)
    return report


def test_whatever_fails_the_others_follow(context, tmp_path):
    def skip(context):
        raise CheckSkippedError("none here")

    def crash(context):
        raise KeyError("x")

    def fail(context):
        raise CheckFailedError("two\nlines", "the end")

    checks = [
        Check("skip", 9, skip),
        Check("crash", 9, crash),
        Check("fail", 9, fail),
        Check("code", 9, python("import sys; print('a'); sys.exit('why')")),
        Check("refused", 9, python("import sys; print('bitlm: no', file=sys.stderr); sys.exit(2)")),
        Check("killed", 9, python("import os; os.abort()")),
        Check("last", 9, python("print(7)")),
    ]
    report = made(checks, context, tmp_path / "out")
    assert [result.line for result in report.results] == [
        "skipped: none here",
        "failed: KeyError: 'x'",
        "failed: two lines",
        "failed: exit code 1: why",
        "failed: no",
        "failed: SIGABRT: it printed nothing",
        "done",
    ]
    assert report.results[-1].numbers == {"out": "7\n"}
    assert report.results[3].output == "a\nwhy\n"
    assert json.loads((tmp_path / "out" / "gpu-cpu.json").read_text())["state"] == "complete"


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_hang_ends_at_the_limit_with_all_its_processes(context, tmp_path):
    file = tmp_path / "pid"
    code = (
        "import subprocess, time, pathlib; p = subprocess.Popen(['sleep', '600']); "
        f"pathlib.Path({str(file)!r}).write_text(f'{{p.pid}}\\n'); time.sleep(600)"
    )

    def hang(context):
        with context.commands.started([sys.executable, "-c", code], {}) as process:
            context.commands.wait(process, lambda: file.exists() and "\n" in file.read_text())
            context.commands.deadline = time.monotonic()
            context.commands.wait(process)

    start = time.monotonic()
    result = run_check(Check("hang", 60, hang), context, start + 60)
    assert result.line.startswith("failed: no end within")
    child = int(file.read_text())
    while is_alive(child) and time.monotonic() < start + 60:
        time.sleep(0.01)
    assert not is_alive(child)


@pytest.mark.parametrize(("limit", "left"), [(0.2, 60), (60, 0.2)])
def test_the_limits_of_a_check_and_of_the_run_hold(limit, left, context):
    check = Check("sleep", limit, python("import time; time.sleep(600)"))
    assert run_check(check, context, time.monotonic() + left).status == Status.FAILED


def test_no_check_starts_when_the_time_is_over(context, tmp_path):
    report = made([Check("late", 9, python("1"))], context, tmp_path / "out", seconds=0.0)
    assert report.results[0].line == "skipped: no time was left"
    assert not report.has_failed


def test_an_interrupt_keeps_what_is_done(context, tmp_path):
    def interrupt(context):
        raise KeyboardInterrupt

    checks = [Check("first", 9, python("1")), Check("second", 9, interrupt)]
    report = Report(MACHINE)
    with pytest.raises(KeyboardInterrupt):
        run_checks(checks, context, report, tmp_path, 60.0, nullcontext, lambda result: None)

    assert report.state == State.INTERRUPTED
    page = (tmp_path / "gpu-cpu.md").read_text()
    assert "| first | done |" in page
    assert "Not complete: interrupted" in page


def test_commands_wait_for_a_condition_and_kill_at_the_end(context, tmp_path):
    file = tmp_path / "there"
    code = f"import pathlib, time; pathlib.Path({str(file)!r}).touch(); time.sleep(600)"
    with context.commands.started([sys.executable, "-c", code], {}) as process:
        assert context.commands.wait(process, file.exists) is None
        assert is_alive(process.pid)
    assert process.returncode == -9
    assert not os.path.exists(f"/proc/{process.pid}")
