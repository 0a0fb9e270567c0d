"""Which code a run was started with: the commit, and a patch of what was changed since."""

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from bitlm_dist.files import to_json, write_atomically


def save_code(folder: Path) -> None:
    """Write code.json and, where the checkout differs from its commit, code.patch.

    A package that is no git checkout has its version alone.
    """
    source = Path(__file__).parent
    root = _git(source, "rev-parse", "--show-toplevel").strip()
    tracked = bool(root) and bool(_git(source, "ls-files", "__init__.py"))
    patch = _git(Path(root), "diff", "--binary", "HEAD") if tracked else ""
    untracked = _git(Path(root), "ls-files", "--others", "--exclude-standard").splitlines() if tracked else []
    record: dict[str, Any] = {
        "version": metadata.version("bitlm-dist"),
        "commit": _git(source, "rev-parse", "HEAD").strip() if tracked else None,
        "changed": bool(patch),
        "untracked": untracked,
    }
    write_atomically(folder / "code.json", to_json(record, indent=1) + "\n")
    if patch:
        write_atomically(folder / "code.patch", patch)
    else:
        (folder / "code.patch").unlink(missing_ok=True)


def _git(folder: Path, *words: str) -> str:
    try:
        answer = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""
