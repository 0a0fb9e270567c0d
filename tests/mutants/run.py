"""Check that the tests still catch known faults.

Each patch in this folder plants one small fault and names the one test that must fail with it. This
script copies the tree into a temporary folder. For each patch it applies the patch there, runs that
test alone, and takes the patch back. A patch file begins with a header::

    Fault: what is wrong in the changed code, in one sentence.
    Test: tests/codes/test_x.py::test_y[case]
    Environment: NAME=VALUE            (optional; the test then runs in a new process)

    --- a/bitlm_dist/codes.py
    +++ b/bitlm_dist/codes.py
    …

Usage: ``make mutants``, or ``python tests/mutants/run.py [--check] [--seconds N] [NAME …]``. With
``--check`` no test runs: the patches must apply and their tests must exist, which takes a second.

A patch that no longer applies is made anew with the same fault. Where a test was renamed, or merged
into another one, the patch names the new one, which must catch the fault as the old one did.

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
# folders of the checkout that are inside the package when it is installed
INSIDE = ("kernels", "data_prep", "launch", "configs")
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "data-*", "runs")
HEADER = re.compile(r"(Fault|Test|Environment): (.+)")
# what takes long to import and reads no variables that a test may set
SLOW = (
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
SECONDS = 120.0
POLL = 0.02
PR_SET_CHILD_SUBREAPER = 36
SLOWEST, SHOWN = 10, 15  # mutants in the summary, lines of what pytest said


class Verdict(StrEnum):
    """What came of one fault."""

    CAUGHT = "caught"
    MISSED = "missed"
    NO_PATCH = "the patch does not apply"
    NO_TEST = "the test does not run"
    TOO_SLOW = "the test takes too long"


# by pytest's exit code; None: it was killed
VERDICTS = {None: Verdict.TOO_SLOW, 0: Verdict.MISSED, 1: Verdict.CAUGHT}


@dataclass(frozen=True)
class Mutant:
    """A patch: what it breaks and which test must notice."""

    file: Path
    fault: str
    test: str
    environment: dict[str, str]

    @property
    def name(self):
        return self.file.stem


@dataclass(frozen=True)
class Outcome:
    """One run of a mutant's test; ``cpu`` is that of all its processes."""

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


# Looking at the patches


def problems(folder=HERE, root=ROOT):
    """What is wrong with the patches of a folder, a line each; no test runs."""
    functions, found = {}, []
    for mutant in mutants_in(folder):
        if problem := _problem_of(mutant, root, functions):
            found.append(f"{mutant.name}: {problem}")
    return found


def _problem_of(mutant, root, functions):
    file, _, test = mutant.test.partition("::")
    if not mutant.fault or not test:
        return "the header needs a line `Fault: …` and a line `Test: FILE::TEST`"
    if said := apply(mutant, root, "--check"):
        return f"{Verdict.NO_PATCH}: {said}"
    if not (root / file).is_file():
        return f"{file} does not exist"
    if file not in functions:
        nodes = ast.walk(ast.parse((root / file).read_text()))
        functions[file] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    name = test.partition("[")[0]
    return "" if name in functions[file] else f"{file} has no test {name}"


def apply(mutant, root, *options):
    """Apply a patch below ``root``. Returns what git has against it, or an empty string."""
    # a repository above the folder would make git leave out the files silently
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    said = _said_by(["git", "apply", *options, str(mutant.file)], root, environment)
    return " ".join(said.stderr.split()) if said.returncode else ""


def _said_by(command, folder, environment):
    settings = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(command, cwd=folder, env=environment, **settings)


# Running the tests


class Tree:
    """A copy of the checkout in which faults are planted, laid out like the installed package."""

    def __init__(self, folder):
        self.root = folder / "tree"
        self._seconds = int(time.time())
        shutil.copytree(ROOT, self.root, ignore=NOT_COPIED)
        for name in INSIDE:
            (self.root / PACKAGE / name).symlink_to(Path("..") / name)

    def plant(self, mutant):
        """Apply a mutant. Returns what is wrong with its patch, or an empty string."""
        return apply(mutant, self.root) or self._date(mutant)

    def restore(self, mutant):
        """Take a mutant back."""
        said = apply(mutant, self.root, "--reverse") or self._date(mutant)
        assert not said, said

    def _date(self, mutant):
        # Python takes compiled code for current if it agrees with its source in size and second,
        # so each version of a file gets a second of its own
        self._seconds += 1
        for file in re.findall(r"^\+\+\+ b/(\S+)", mutant.file.read_text(), re.MULTILINE):
            os.utime(self.root / file, (self._seconds, self._seconds))
        return ""

    def check_precedence(self, environment):
        """Make sure that processes import this copy and not the installed package."""
        modules = [PACKAGE, *(f"{PACKAGE}.{name}" for name in INSIDE)]
        script = "import sys\nfrom importlib.util import find_spec\n"
        script += "for name in sys.argv[1:]: print(*find_spec(name).submodule_search_locations)"
        said = _said_by([sys.executable, "-c", script, *modules], "/", environment)
        places = [Path(line) for line in said.stdout.splitlines()]
        here = [place for place in places if place.is_relative_to(self.root)]
        assert len(here) == len(modules), f"the tests would import {places}: {said.stderr}"


def run(mutant, tree, folder, limit):
    """Plant one fault, run its test alone, and take the fault back."""
    if said := tree.plant(mutant):
        return Outcome(mutant, Verdict.NO_PATCH, output=said)
    log, began = folder / "log", time.monotonic()
    try:
        code, cpu = _run_test(mutant, tree.root, folder, log, limit)
    finally:
        _kill_descendants()
        tree.restore(mutant)
    verdict, seconds = VERDICTS.get(code, Verdict.NO_TEST), time.monotonic() - began
    return Outcome(mutant, verdict, seconds, cpu, log.read_text(errors="replace"))


def _run_test(mutant, root, folder, log, limit):
    """Returns pytest's exit code (None: too slow, below 0: a signal), and its CPU seconds."""
    child = os.fork()
    if child == 0:
        _become_pytest(mutant, root, folder, log)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(POLL)
    os.kill(child, signal.SIGKILL)
    usage = os.wait4(child, 0)[2]
    return None, usage.ru_utime + usage.ru_stime


def _become_pytest(mutant, root, folder, log):
    """In the forked process: run the test and end with pytest's exit code."""
    code = 3
    try:
        os.setsid()  # Ctrl-C is for the parent, which ends all others
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(root)
        os.environ |= environment_of(root, folder) | mutant.environment
        words = [mutant.test, "-x", "-p", "no:cacheprovider"]
        if mutant.environment:  # what is imported already may have read the old one
            os.execv(sys.executable, [sys.executable, "-m", "pytest", *words])
        sys.path[0] = str(root)
        tempfile.tempdir = None  # read anew
        code = int(importlib.import_module("pytest").main(words))
    finally:
        sys.stdout.flush()
        os._exit(code)


def environment_of(root, folder):
    """Variables of the processes that run tests."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "TMPDIR": str(temporary), **ONE_THREAD}


def _kill_descendants():
    """End whatever a test has left; orphans have become children of this process."""
    while children := psutil.Process().children(recursive=True):
        for process in children:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(POLL)


def run_all(mutants, limit=SECONDS):
    """Run the tests of all mutants and report. Returns whether each was caught."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's background job ignores it
        signal.signal(number, signal.default_int_handler)
    began, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        tree = Tree(folder)
        tree.check_precedence({**os.environ, **environment_of(tree.root, folder)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in SLOW:
                importlib.import_module(module)
        _prepare_hypothesis()
        assert PACKAGE not in sys.modules, "the parent must leave the package to its forks"
        for mutant in mutants:
            outcomes.append(run(mutant, tree, folder, limit))
            _report(outcomes[-1])
    return _summarise(outcomes, time.monotonic() - began)


def _prepare_hypothesis():
    """Let hypothesis try the same examples in every run, and only what they show fail a test."""
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "mutants",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # making an example smaller takes up to a minute
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("mutants")


def _report(outcome):
    mutant, verdict = outcome.mutant, outcome.verdict
    print(f"{outcome.seconds:5.1f} s {outcome.cpu:5.1f} CPU s", end="  ")
    # a fault may end what prepares a test, as where ranks of a job meet no more
    is_setup = verdict == Verdict.CAUGHT and "\nERROR " in outcome.output
    where = " in the setup" if is_setup else ""
    print(f"{mutant.name}: {verdict}{where} ({mutant.test})", flush=True)
    if verdict != Verdict.CAUGHT:
        print(f"    {mutant.fault}")
        for line in outcome.output.splitlines()[-SHOWN:]:
            print(f"    | {line}", flush=True)


def _summarise(outcomes, seconds):
    """Print the totals. Returns whether all faults were caught."""
    caught = sum(outcome.verdict == Verdict.CAUGHT for outcome in outcomes)
    slowest = sorted(outcomes, key=lambda outcome: -outcome.cpu)[:SLOWEST]
    words = ", ".join(f"{outcome.mutant.name} {outcome.cpu:.0f}" for outcome in slowest)
    print(f"{sum(outcome.cpu for outcome in outcomes):.0f} CPU seconds; most: {words}")
    print(f"{caught} of {len(outcomes)} caught in {seconds:.0f} s")
    return caught == len(outcomes)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants; none: all")
    explained = "run no test: do the patches apply, and do the tests exist?"
    parser.add_argument("--check", action="store_true", help=explained)
    explained = "limit for each test; a busy machine needs more than %(default).0f"
    parser.add_argument("--seconds", type=float, default=SECONDS, help=explained)
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
