"""Steps with a complete checkpoint, and its health. Imports no torch, for launchers."""

import json
import re
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "state.json"
HEALTH = "health.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def folder_of(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return [step for step in all_steps(root) if (folder_of(root, step) / MANIFEST).is_file()]


def all_steps(root: Path) -> list[int]:
    """Steps with a checkpoint, ascending.

    One without a manifest has lost it: a folder gets its name when it is complete.
    """
    # A link to a checkpoint, such as ``latest``, is no other one.
    matches = (
        _STEP_FOLDER.fullmatch(path.name)
        for path in (root.iterdir() if root.is_dir() else ())
        if not path.is_symlink()
    )
    return sorted(int(match[1]) for match in matches if match)


def read_train_state(folder: Path) -> dict[str, Any]:
    """Read step, tokens, data position and so on, of a checkpoint that passed :func:`verify`."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def read_health(folder: Path) -> bool | None:
    """Read whether a checkpoint is healthy.

    Returns:
        True if loss and gradient norm were finite in its step and in the next one; None if they
        were in its step, and the next one has not been taken.
    """
    try:
        return bool(json.loads((folder / HEALTH).read_text())["healthy"])
    except (OSError, ValueError, KeyError, TypeError):
        pass

    # Not judged yet, so only its own step is known.
    try:
        return None if read_train_state(folder).get("finite", True) else False
    except (OSError, ValueError, AttributeError):
        return None
