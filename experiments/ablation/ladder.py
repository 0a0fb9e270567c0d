"""Print the overrides of a row of the study, as words for the command line of `bitlm train`.

Without a name, list the rows. See README.md, and ladder.yaml for the rows themselves.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

LADDER = Path(__file__).with_name("ladder.yaml")
USER_ERROR_EXIT_CODE = 2


def rows() -> dict[str, dict[str, Any]]:
    """Read the overrides of every row, with those of the rows that it starts from."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in yaml.safe_load(LADDER.read_text()).items():
        start = row.pop("from", None)
        found[name] = (found[start] if start else {}) | row
    return found


def words(overrides: dict[str, Any]) -> list[str]:
    """Format overrides for a command line."""
    return [
        word
        for key, value in overrides.items()
        for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def main(names: list[str]) -> int:
    """Print the words of a row, or the names of all rows.

    Returns:
        The exit code.
    """
    ladder = rows()
    if not names:
        print("\n".join(ladder))
        return 0

    if len(names) > 1 or names[0] not in ladder:
        print(
            f"no row {' '.join(names)} in {LADDER.name}; there are {', '.join(ladder)}",
            file=sys.stderr,
        )
        return USER_ERROR_EXIT_CODE
    print(*words(ladder[names[0]]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
