"""Compare golden losses of two commits: `python tests/golden/compare.py A B`.

A and B are two files, or two folders that `make golden` wrote. Exit code 0: all values are the
same or, between machine types, within the tolerances; 1: one is not; 2: nothing to compare.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

import golden


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()

    pairs = matching_files(args.before, args.after)
    if not pairs:
        print(
            f"{args.before} and {args.after} share no golden losses: "
            "name two files, or two folders that `make golden` wrote"
        )
        return 2

    failed = False
    for before, after in pairs:
        try:
            a = golden.load_golden(before)
            b = golden.load_golden(after)
        except ValueError as error:
            print(error)
            return 2
        lines = golden.differences(a, b)
        other = golden.machine_difference(a, b)
        same = f"the same within the tolerances ({other})" if other else "the same, bit by bit"
        print(f"{before.stem}: {'; '.join(lines) or same}")
        failed |= bool(lines)

    return int(failed)


def matching_files(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """Pairs of files to compare; a file that one folder lacks is reported when it is read."""
    if before.is_dir() and after.is_dir():
        names = sorted({file.name for folder in (before, after) for file in folder.glob("*.json")})
        return [(before / name, after / name) for name in names]
    return [(before, after)] if before.is_file() and after.is_file() else []


if __name__ == "__main__":
    sys.exit(main())
