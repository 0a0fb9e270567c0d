"""The planted faults of tests/mutants still apply; `make mutants` runs them."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("mutants") / "run.py"
SPEC = importlib.util.spec_from_file_location("mutants_run", FILE)
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)


def test_every_patch_applies_and_its_test_exists():
    assert mutants.problems() == []


CODE = "one = 1\ntwo = 2\n"
PATCH = "\n--- a/code.py\n+++ b/code.py\n@@ -1,2 +1,2 @@\n one = 1\n-two = {found}\n+two = 3\n"
# name of a patch: what its header names, what it expects in the code, what is said of it
BROKEN = {
    "good": ("Test: tests/test_code.py::test_two[a]", "2", ""),
    "moved": ("Test: tests/test_code.py::test_two", "4", "the patch does not apply: error: "),
    "renamed": ("Test: tests/test_code.py::test_b", "2", "tests/test_code.py has no test test_b"),
    "removed": ("Test: tests/test_gone.py::test_two", "2", "tests/test_gone.py does not exist"),
    "unnamed": ("Tests: tests/test_code.py::test_two", "2", "the header needs a line `Fault: …`"),
}


@pytest.fixture
def tree(tmp_path):
    """A folder with one module and one test."""
    root = tmp_path / "tree"
    (root / "tests").mkdir(parents=True)
    (root / "code.py").write_text(CODE)
    (root / "tests" / "test_code.py").write_text("def test_two():\n    pass\n")
    return root


def write(folder, name):
    test, found, _ = BROKEN[name]
    folder.mkdir(exist_ok=True)
    text = f"Fault: two is three.\n{test}\n" + PATCH.format(found=found)
    (folder / f"{name}.patch").write_text(text)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_patch_is_named(name, tree, tmp_path):
    write(tmp_path / "patches", name)
    found = mutants.problems(tmp_path / "patches", tree)
    message = BROKEN[name][2]
    assert len(found) == (1 if message else 0)
    assert not found or found[0].startswith(f"{name}: {message}")
    assert (tree / "code.py").read_text() == CODE, "nothing is changed by a check"


def test_a_patch_is_taken_back(tree, tmp_path):
    write(tmp_path / "patches", "good")
    (mutant,) = mutants.mutants_in(tmp_path / "patches")
    assert mutants.apply_patch(mutant, tree) == ""
    assert (tree / "code.py").read_text() == CODE.replace("two = 2", "two = 3")
    assert mutants.apply_patch(mutant, tree, "--reverse") == ""
    assert (tree / "code.py").read_text() == CODE


def test_headers(tmp_path):
    lines = ["Fault: two is three.", "Test: a.py::test_b[c, d]", "Environment: X=1 Y=a=b"]
    (tmp_path / "x.patch").write_text("\n".join(lines) + "\n" + PATCH.format(found="2"))
    (mutant,) = mutants.mutants_in(tmp_path)
    assert (mutant.name, mutant.fault) == ("x", "two is three.")
    assert mutant.test == "a.py::test_b[c, d]"
    assert mutant.environment == {"X": "1", "Y": "a=b"}
