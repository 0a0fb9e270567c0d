"""The pages of the documentation, and what tests read in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
]

BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`([^`\n]*)`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_folder_tables() -> dict[str, set[str]]:
    """Names in the first column of the tables of docs/run-folder.md, by heading."""
    tables = {}
    for section in re.split(r"^##+ ", (DOCS / "run-folder.md").read_text(), flags=re.MULTILINE):
        cells = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
        names = {name for cell in cells for name in INLINE_CODE.findall(cell)}
        if names:
            tables[section.partition("\n")[0]] = names
    return tables
