"""Rewrite the golden losses, or write this commit's to a folder: `make golden OUT=folder`.

To prove that a change keeps every value bit by bit, run it before and after the change on one
machine, and compare the two folders with compare.py.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from bitlm_dist.cpu_threads import set_cpu_environment

set_cpu_environment(os.environ)  # as the tests do, before torch is loaded
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

import golden  # noqa: E402

from bitlm_dist.data_prep.prepare import prepare  # noqa: E402

SAMPLE = Path(__file__).parents[2] / "data_prep" / "sample" / "kjv.jsonl.zst"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=golden.HERE, help="folder for the files")
    out = parser.parse_args().out

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare([SAMPLE], "bpe:4096", data)
        for case in golden.CASES:
            file = out / f"{case}.json"
            found = golden.measure(case, data)
            if file.is_file():
                old = golden.load_golden(file)
                if other := golden.machine_difference(old, found):
                    print(
                        f"{file.name}: ANOTHER MACHINE TYPE ({other}): its diff proves nothing; "
                        "compare commits on one machine"
                    )
                lines = golden.differences(old, found)
                print(f"{file.name}: {'; '.join(lines) or 'as before'}")
            else:
                print(f"{file.name}: new")
            golden.save_golden(found, file)


if __name__ == "__main__":
    main()
