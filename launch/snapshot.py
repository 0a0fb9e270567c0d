"""Record of the code of a run: the commit, and a patch of the uncommitted changes."""

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from bitlm_dist.files import write_atomically
from bitlm_dist.strict_json import to_json


def save_code(folder: Path) -> None:
    """Write code.json and, if the checkout differs from its commit, code.patch.

    For a package that is not in a git checkout only the version is recorded.
    """
    record, patch = describe_code()
    write_atomically(folder / "code.json", to_json(record, indent=1) + "\n")

    # a patch of an earlier submission must not stay beside the new commit
    if patch:
        write_atomically(folder / "code.patch", patch)
    else:
        (folder / "code.patch").unlink(missing_ok=True)


def describe_code() -> tuple[dict[str, Any], str]:
    """Version, commit and changes of this package.

    Returns:
        The record of code.json, and a patch of the uncommitted changes; empty if there are none.
    """
    source = Path(__file__).parent
    root = _git(source, "rev-parse", "--show-toplevel").strip()

    # an installed package may lie inside a repository that does not track it
    tracked = bool(root) and bool(_git(source, "ls-files", "__init__.py"))
    patch = _git(Path(root), "diff", "--binary", "HEAD") if tracked else ""
    untracked = (
        _git(Path(root), "ls-files", "--others", "--exclude-standard").splitlines()
        if tracked
        else []
    )

    record: dict[str, Any] = {
        "version": metadata.version("bitlm-dist"),
        "commit": _git(source, "rev-parse", "HEAD").strip() if tracked else None,
        "changed": bool(patch),
        "untracked": untracked,
    }
    return record, patch


def _git(folder: Path, *words: str) -> str:
    """Run git and return its output; empty if it fails."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""

    return answer.stdout if answer.returncode == 0 else ""
