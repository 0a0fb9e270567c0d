"""Links and quotes of the docs.

A quote is a fenced python block right below a line that is a link to a file, and perhaps a name::

    [`bitlm_dist/codes.py`](../bitlm_dist/codes.py), `BitCodes.ids_to_bits`

Other blocks are examples, which docs/how-to.md has and docs/tour.md has not.
"""

import re
import textwrap
from pathlib import Path

import pytest
from pages import BLOCK, DOCS, INLINE_CODE, PAGES, ROOT, name_of, run_folder_tables

from bitlm_dist import errors
from bitlm_dist.model.loss_terms import TERMS

QUOTING_PAGES = [DOCS / "tour.md", DOCS / "how-to.md"]
MAX_COLUMNS = 132

LINK = re.compile(r"\]\(([^)\s]+)\)")
PYTHON_BLOCK = re.compile(r"^([^\n]*)\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK_LINE = re.compile(r"\[`(?P<shown>[^`]+)`\]\((?P<target>[^)]+)\)(, `(?P<name>[\w.]+)`)?")


def python_blocks(page):
    """Line above and code of each python block."""
    return PYTHON_BLOCK.findall(page.read_text())


def without_common_indentation(lines):
    return textwrap.dedent("\n".join(line.rstrip() for line in lines)).splitlines()


def occurs_in(code, text):
    """Whether the lines of ``code`` occur in a row, whatever their common indentation."""
    wanted = without_common_indentation(code.splitlines())
    lines = text.splitlines()
    return any(
        lines[first].strip() == wanted[0].strip()
        and without_common_indentation(lines[first : first + len(wanted)]) == wanted
        for first in range(len(lines) - len(wanted) + 1)
    )


def quote_problems(page):
    """What is wrong with the quotes of a page, a line each."""
    for above, code in python_blocks(page):
        match = LINK_LINE.fullmatch(above)
        begin = code.strip().partition("\n")[0]
        if match is None:
            if page.name == "tour.md":
                yield f"`{begin}` has no link to its file above it"
            continue

        file = (page.parent / match["target"]).resolve()
        if file != ROOT / match["shown"]:
            yield f"{match['shown']} links to {match['target']}"
            continue
        text = file.read_text()
        if not occurs_in(code, text):
            yield f"{match['shown']} has no such lines as those from `{begin}` on: quote it anew"
        for part in filter(None, (match["name"] or "").split(".")):
            if not re.search(rf"^\s*(def|class) {part}\b", text, re.MULTILINE):
                yield f"{match['shown']} has no {match['name']}"


def test_code_in_the_tour_is_in_the_files():
    problems = [f"{name_of(p)}: {text}" for p in QUOTING_PAGES for text in quote_problems(p)]
    assert not problems, "\n".join(problems)
    assert len(python_blocks(DOCS / "tour.md")) > 30, "the pattern finds no blocks any more"


def test_a_quote_that_differs_is_found():
    text = "class A:\n    def f(self):\n        x = 1\n\n        return x\n"
    assert occurs_in("x = 1\n\nreturn x\n", text)
    assert occurs_in("def f(self):\n    x = 1\n", text)
    for other in ("x = 1\nreturn x\n", "x = 2\n", "def f(self):\nx = 1\n", "return x\ny\n"):
        assert not occurs_in(other, text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    prose = INLINE_CODE.sub("", BLOCK.sub("", page.read_text()))
    targets = [target for target in LINK.findall(prose) if not re.match(r"[a-z]+:", target)]
    paths = {target.partition("#")[0] for target in targets} - {""}
    missing = sorted(path for path in paths if not (page.parent / path).exists())
    assert not missing, f"{name_of(page)} links to {', '.join(missing)}"


def test_tests_that_a_recipe_names_exist():
    page = (DOCS / "how-to.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    files = ("\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py")), page)
    missing = [name for name in sorted(named) if not any(f"def {name}(" in f for f in files)]
    assert not missing


def test_names_on_the_page_of_the_run_folder_are_in_the_code():
    folders = ("bitlm_dist", "launch")
    code = "\n".join(f.read_text() for folder in folders for f in (ROOT / folder).rglob("*.py"))
    code += "".join(f" loss_{term} loss_{term}_by_position" for term in TERMS)  # LossTerms.metrics
    for heading, names in run_folder_tables().items():
        for name in names:
            # up to what differs from run to run
            word = Path(re.split(r"NAME|NODE|\d", name)[0]).name
            assert word in code, f"{heading}: nothing writes {name}"


def test_the_architecture_names_every_module():
    page = (DOCS / "architecture.md").read_text()
    folders = ("bitlm_dist", "kernels", "data_prep", "launch")
    modules = {file for folder in folders for file in (ROOT / folder).rglob("*.py")}
    missing = {name_of(m) for m in modules if m.name not in page and m.name != "__init__.py"}
    assert missing == set()


def test_exit_codes_of_the_table_are_those_of_the_program():
    page = (DOCS / "reliability.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    constants = {value for name, value in vars(errors).items() if name.endswith("EXIT_CODE")}
    assert codes == constants | {0, 1}


@pytest.mark.parametrize("page", QUOTING_PAGES, ids=name_of)
def test_pages_fit_a_screen(page):
    lines = page.read_text().splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert not wide, f"{name_of(page)}: lines {wide} have more than {MAX_COLUMNS} columns"
