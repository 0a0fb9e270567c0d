"""Check that the tests still catch known faults.

Each patch in this folder plants one small fault and names the one test that must fail with it. This
script copies the tree into a temporary folder. For each patch it applies the patch there, runs that
test alone, and undoes the patch. A patch file begins with a header::

    Fault: what is wrong in the changed code, in one sentence.
    Test: tests/codes/test_x.py::test_y[case]
    Environment: NAME=VALUE            (optional; the test then runs in a new process)

    --- a/bitlm_dist/codes.py
    +++ b/bitlm_dist/codes.py
    …

Usage: ``make mutants``, or ``python tests/mutants/run.py [--check] [--seconds N] [NAME …]``. With
``--check`` no test runs: the patches must apply and their tests must exist, which takes a second.

A patch that no longer applies must be remade with the same fault. Where a test was renamed or
merged into another, the patch must name the new one, which must catch the fault as the old one did.

Tests run in forks of a process that has imported the slow libraries, and nothing of the package.
The exit code is 1 if a fault was not caught.
"""

import argparse
import ast
import ctypes
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "bitlm_dist"
# Folders of the checkout that are inside the package when it is installed.
PACKAGE_FOLDERS = ("kernels", "data_prep", "launch", "configs")
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "data-*", "runs")
HEADER = re.compile(r"(Fault|Test|Environment): (.+)")
# Libraries that are slow to import and do not read variables that a test may set.
SLOW_IMPORTS = (
    "torch",
    "megatron.core.optimizer",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.transformer.transformer_layer",
    "hypothesis",
    "pytest",
    "pydantic",
    "typer",
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
TEST_TIMEOUT = 120.0
POLL_SECONDS = 0.02
PR_SET_CHILD_SUBREAPER = 36
NUM_SLOWEST = 10  # mutants in the summary
NUM_LINES = 15  # of pytest's output


class Verdict(StrEnum):
    """Outcome of one fault."""

    CAUGHT = "caught"
    MISSED = "missed"
    NO_PATCH = "the patch does not apply"
    NO_TEST = "the test does not run"
    TOO_SLOW = "the test takes too long"


# By pytest's exit code; None: it was killed.
VERDICT_BY_EXIT_CODE = {None: Verdict.TOO_SLOW, 0: Verdict.MISSED, 1: Verdict.CAUGHT}


@dataclass(frozen=True)
class Mutant:
    """A patch, the fault it plants, and the test that must fail."""

    file: Path
    fault: str
    test: str
    environment: dict[str, str]

    @property
    def name(self):
        return self.file.stem


@dataclass(frozen=True)
class Outcome:
    """One run of a mutant's test; ``cpu`` is the CPU seconds of all its processes."""

    mutant: Mutant
    verdict: Verdict
    seconds: float = 0.0
    cpu: float = 0.0
    output: str = ""


def read_mutant(file):
    """Parse a patch file's header; missing fields are empty."""
    header = file.read_text().partition("\n--- ")[0]
    matches = filter(None, map(HEADER.fullmatch, header.splitlines()))
    fields = dict(match.groups() for match in matches)
    variables = dict(word.split("=", 1) for word in fields.get("Environment", "").split())
    return Mutant(file, fields.get("Fault", ""), fields.get("Test", ""), variables)


def mutants_in(folder):
    """All mutants of a folder, by name."""
    return [read_mutant(file) for file in sorted(folder.glob("*.patch"))]


# Checking the patches


def problems(folder=HERE, root=ROOT):
    """List problems with the patches of a folder, one line each; no test runs."""
    functions = {}  # names by file
    found = []
    for mutant in mutants_in(folder):
        if problem := _problem_of(mutant, root, functions):
            found.append(f"{mutant.name}: {problem}")
    return found


def _problem_of(mutant, root, functions):
    """Describe the first problem of a patch; an empty string if there is none."""
    file, _, test = mutant.test.partition("::")
    if not mutant.fault or not test:
        return "the header needs a line `Fault: …` and a line `Test: FILE::TEST`"
    if error := apply_patch(mutant, root, "--check"):
        return f"{Verdict.NO_PATCH}: {error}"

    if not (root / file).is_file():
        return f"{file} does not exist"
    if file not in functions:
        nodes = ast.walk(ast.parse((root / file).read_text()))
        functions[file] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}

    name = test.partition("[")[0]
    return "" if name in functions[file] else f"{file} has no test {name}"


def apply_patch(mutant, root, *options):
    """Apply a patch below ``root``. Returns git's error, or an empty string."""
    # With a repository above the folder, git would skip the files silently.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    done = _run_command(["git", "apply", *options, str(mutant.file)], root, environment)
    return " ".join(done.stderr.split()) if done.returncode else ""


def _run_command(command, folder, environment):
    settings = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(command, cwd=folder, env=environment, **settings)


# Running the tests


class Tree:
    """A copy of the checkout in which faults are planted, laid out like the installed package."""

    def __init__(self, folder):
        self.root = folder / "tree"
        self._seconds = int(time.time())
        shutil.copytree(ROOT, self.root, ignore=NOT_COPIED, symlinks=True)

    def plant(self, mutant):
        """Apply a mutant. Returns the error of its patch, or an empty string."""
        return apply_patch(mutant, self.root) or self._touch(mutant)

    def revert(self, mutant):
        """Undo a mutant."""
        error = apply_patch(mutant, self.root, "--reverse") or self._touch(mutant)
        assert not error, error

    def _touch(self, mutant):
        # Python considers compiled code current if size and second of its source agree, so each
        # version of a file gets its own second.
        self._seconds += 1
        for file in re.findall(r"^\+\+\+ b/(\S+)", mutant.file.read_text(), re.MULTILINE):
            os.utime(self.root / file, (self._seconds, self._seconds))
        return ""

    def check_precedence(self, environment):
        """Make sure that processes import this copy and not the installed package."""
        modules = [PACKAGE, *(f"{PACKAGE}.{name}" for name in PACKAGE_FOLDERS)]
        script = "import sys\nfrom importlib.util import find_spec\n"
        script += "for name in sys.argv[1:]: print(*find_spec(name).submodule_search_locations)"
        done = _run_command([sys.executable, "-c", script, *modules], "/", environment)

        imported_folders = [Path(line) for line in done.stdout.splitlines()]
        own_folders = [place for place in imported_folders if place.is_relative_to(self.root)]
        assert len(own_folders) == len(modules), (
            f"the tests would import {imported_folders}: {done.stderr}"
        )


def run_mutant(mutant, tree, folder, limit):
    """Plant one fault, run its test alone, and undo the fault."""
    if error := tree.plant(mutant):
        return Outcome(mutant, Verdict.NO_PATCH, output=error)

    log = folder / "log"
    start = time.monotonic()
    try:
        code, cpu = _run_test(mutant, tree.root, folder, log, limit)
    finally:
        _kill_descendants()
        tree.revert(mutant)

    verdict = VERDICT_BY_EXIT_CODE.get(code, Verdict.NO_TEST)
    seconds = time.monotonic() - start
    return Outcome(mutant, verdict, seconds, cpu, log.read_text(errors="replace"))


def _run_test(mutant, root, folder, log, limit):
    """Run a mutant's test in a fork.

    Returns pytest's exit code (None: too slow, below 0: a signal), and its CPU seconds.
    """
    child = os.fork()
    if child == 0:
        _become_pytest(mutant, root, folder, log)

    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(POLL_SECONDS)

    os.kill(child, signal.SIGKILL)
    usage = os.wait4(child, 0)[2]
    return None, usage.ru_utime + usage.ru_stime


def _become_pytest(mutant, root, folder, log):
    """Run the test in the forked process, which exits with pytest's code."""
    code = 3
    try:
        # Ctrl-C must reach only the parent, which kills all others.
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)

        os.chdir(root)
        os.environ |= environment_of(root, folder) | mutant.environment
        words = [mutant.test, "-x", "-p", "no:cacheprovider"]
        # Modules that are already imported may have read the old environment.
        if mutant.environment:
            os.execv(sys.executable, [sys.executable, "-m", "pytest", *words])

        sys.path[0] = str(root)
        tempfile.tempdir = None  # to read TMPDIR again
        code = int(importlib.import_module("pytest").main(words))
    finally:
        sys.stdout.flush()
        os._exit(code)


def environment_of(root, folder):
    """Environment variables of the processes that run tests."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "TMPDIR": str(temporary), **ONE_THREAD}


def _kill_descendants():
    """Kill processes that a test has left; orphans have become children of this process."""
    while children := psutil.Process().children(recursive=True):
        for process in children:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(POLL_SECONDS)


def run_all(mutants, limit=TEST_TIMEOUT):
    """Run the tests of all mutants and report. Returns True if every fault was caught."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    # A background job of a shell ignores SIGINT by default.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    start = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        tree = Tree(folder)
        tree.check_precedence({**os.environ, **environment_of(tree.root, folder)})

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in SLOW_IMPORTS:
                importlib.import_module(module)
        _prepare_hypothesis()
        assert PACKAGE not in sys.modules, "the parent must leave the package to its forks"

        for mutant in mutants:
            outcomes.append(run_mutant(mutant, tree, folder, limit))
            _report(outcomes[-1])

    return _summarise(outcomes, time.monotonic() - start)


def _prepare_hypothesis():
    """Make hypothesis try the same examples in every run, and let only these decide."""
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "mutants",
        derandomize=True,
        database=None,
        deadline=None,
        # Shrinking an example takes up to a minute.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("mutants")


def _report(outcome):
    mutant = outcome.mutant
    verdict = outcome.verdict
    print(f"{outcome.seconds:5.1f} s {outcome.cpu:5.1f} CPU s", end="  ")

    # A fault may break the setup of a test, e.g. where the ranks of a job no longer meet.
    is_setup = verdict == Verdict.CAUGHT and "\nERROR " in outcome.output
    where = " in the setup" if is_setup else ""
    print(f"{mutant.name}: {verdict}{where} ({mutant.test})", flush=True)
    if verdict != Verdict.CAUGHT:
        print(f"    {mutant.fault}")
        for line in outcome.output.splitlines()[-NUM_LINES:]:
            print(f"    | {line}", flush=True)


def _summarise(outcomes, seconds):
    """Print the totals. Returns True if every fault was caught."""
    caught = sum(outcome.verdict == Verdict.CAUGHT for outcome in outcomes)
    slowest = sorted(outcomes, key=lambda outcome: -outcome.cpu)[:NUM_SLOWEST]
    words = ", ".join(f"{outcome.mutant.name} {outcome.cpu:.0f}" for outcome in slowest)
    print(f"{sum(outcome.cpu for outcome in outcomes):.0f} CPU seconds; most: {words}")
    print(f"{caught} of {len(outcomes)} caught in {seconds:.0f} s")
    return caught == len(outcomes)


def main():
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants; none: all")
    explained = "run no test: do the patches apply, and do the tests exist?"
    parser.add_argument("--check", action="store_true", help=explained)
    explained = "limit for each test; a busy machine needs more than %(default).0f"
    parser.add_argument("--seconds", type=float, default=TEST_TIMEOUT, help=explained)
    words = parser.parse_args()

    if words.check:
        found = problems()
        print("\n".join(found or ["all patches apply, and their tests exist"]))
        return 1 if found else 0

    mutants = mutants_in(HERE)
    if unknown := set(words.names) - {mutant.name for mutant in mutants}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in mutants if not words.names or mutant.name in words.names]

    try:
        return 0 if run_all(chosen, words.seconds) else 1
    except KeyboardInterrupt:
        _kill_descendants()
        return 130


if __name__ == "__main__":
    sys.exit(main())
