"""Checkpoints: one folder each, complete or absent.

A folder is built beside its place, flushed, given a manifest with the size and SHA-256 of every file, and renamed::

    checkpoints/
        step-00000120/
            rank-00000.safetensors …   slices of tensors (tensors.py)
            index.json                 which file holds which slice
            state.json                 step, tokens, position in the data and its fingerprint, config, versions
            manifest.json              format; size and hash of every other file
            health.json                written once the step after it is known (retention.py)
        latest -> step-00000120

The format does not know the layout that wrote it, and nothing in it is ever executed: numbers are safetensors, the rest is JSON.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.tensors import INDEX, Entry, Written, index_of
from bitlm_dist.errors import UserError
from bitlm_dist.files import sha256_of, sync_folder, to_json, write_atomically

FORMAT = 2
MANIFEST, STATE, HEALTH, LATEST = "manifest.json", "state.json", "health.json", "latest"
STEP = re.compile(r"step-(\d{8,})")
HIDDEN = (".*.partial", ".*.removed")  # what a killed process may have left


class SaveError(UserError):
    """A checkpoint could not be written; those before it are as they were."""


class DamagedError(UserError):
    """A checkpoint is not what its manifest says, or its manifest cannot be read."""


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return root / f"step-{step:08d}"


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    found = (STEP.fullmatch(path.parent.name) for path in root.glob(f"*/{MANIFEST}") if not path.parent.is_symlink())
    return sorted(int(match[1]) for match in found if match)


def begin(root: Path, step: int) -> Path:
    """Make the folder that a checkpoint is built in, and remove what killed processes left, as far as that goes."""
    for rubbish in _leftovers(root):
        if rubbish.is_symlink():
            rubbish.unlink(missing_ok=True)
        shutil.rmtree(rubbish, ignore_errors=True)
    building = building_of(root, step)
    building.mkdir(parents=True)
    sync_folder(root.parent)
    return building


def _leftovers(root: Path) -> list[Path]:
    return [path for pattern in HIDDEN for path in root.glob(pattern)]


def leftover_bytes(root: Path) -> int:
    """What :func:`begin` will free of what killed processes left."""
    return sum(file.stat().st_size for folder in _leftovers(root) for file in folder.rglob("*") if file.is_file())


def building_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is built."""
    return root / f".step-{step:08d}.partial"


def file_of(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def complete(
    root: Path, step: int, state: Mapping[str, Any], shares: Sequence[Sequence[Entry]], written: Iterable[Written]
) -> Path:
    """All ranks have written their files: describe the folder and put it in its place.

    Args:
        state: JSON values.
        shares, written: what each rank has written.
    """
    building, final = building_of(root, step), folder_of(root, step)
    files = {file_of(rank): found._asdict() for rank, found in enumerate(written)}
    texts = {
        INDEX: index_of({file_of(rank): entries for rank, entries in enumerate(shares)}),
        STATE: to_json({"step": step, **state}, indent=1) + "\n",
    }
    for name, text in texts.items():
        write_atomically(building / name, text)
        files[name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_atomically(building / MANIFEST, to_json({"format": FORMAT, "files": files}, indent=1) + "\n")
    if final.exists():  # incomplete, or a rerun of the same step
        remove(final)
    building.rename(final)
    sync_folder(root)
    point_latest(root)
    return final


def point_latest(root: Path) -> None:
    """Let the link ``latest`` name the newest complete checkpoint, if the file system has links and nothing else has that name."""
    steps, link = complete_steps(root), root / f".{LATEST}"
    with suppress(OSError):
        link.unlink(missing_ok=True)
        if not steps:
            (root / LATEST).unlink(missing_ok=True)
            return
        link.symlink_to(folder_of(root, steps[-1]).name)
        link.rename(root / LATEST)


def abandon(root: Path, step: int) -> None:
    """A save failed: leave nothing of it."""
    shutil.rmtree(building_of(root, step), ignore_errors=True)


def remove(folder: Path) -> Thread:
    """Remove a checkpoint -> the thread that does; it is none from now on, so no half of it is ever taken for whole."""
    hidden = folder.with_name(f".{folder.name}.{time.time_ns()}.removed")
    folder.rename(hidden)
    sync_folder(folder.parent)
    thread = Thread(target=shutil.rmtree, args=(hidden, True), daemon=True, name="removal")
    thread.start()
    return thread


def save(root: Path, step: int, entries: Sequence[Entry], tensors: Iterable[Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint from one process, which has all of it."""
    written = tensor_files.write(begin(root, step) / file_of(0), entries, tensors)
    return complete(root, step, state, [entries], [written])


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Hash the files of a checkpoint, or every ``parts``-th of them from number ``part`` on, and compare with the manifest.

    Raises:
        DamagedError: a file is missing, cannot be read or is not what it was; the message names it.
        UserError: the checkpoint is incomplete or of another format.
    """
    files = read_manifest(folder)
    for name in sorted(files)[part::parts]:
        file, expected = folder / name, files[name]
        try:
            if not file.is_file():
                raise DamagedError(f"checkpoint file {file} is missing")
            if os.path.getsize(file) != expected["bytes"] or sha256_of(file) != expected["sha256"]:
                raise DamagedError(f"checkpoint file {file} is damaged")
        except OSError as error:
            raise DamagedError(f"checkpoint file {file} cannot be read ({error})") from error
        except (KeyError, TypeError):
            raise DamagedError(f"checkpoint file {folder / MANIFEST} is damaged") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Size and hash of every file.

    Raises:
        DamagedError: it is missing or cannot be read.
        UserError: it is of another format.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DamagedError(f"{folder} is no complete checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text())
        found = int(manifest.get("format", 1))
        if found == FORMAT:
            return dict(manifest["files"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise DamagedError(f"checkpoint file {file} is damaged") from None
    advice = "upgrade bitlm-dist" if found > FORMAT else "go on with the version that wrote it"
    raise UserError(f"{folder} has format {found}, this version reads format {FORMAT}: {advice}")


def read_state(folder: Path) -> dict[str, Any]:
    """Step, tokens, position in the data and so on, of a checkpoint that :func:`verify` has found whole."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def describe(folder: Path) -> dict[str, Any]:
    """Step, tokens, size, time and health of a complete checkpoint, without reading its tensors.

    Raises:
        DamagedError: its description is.
    """
    files = read_manifest(folder)
    try:
        state = read_state(folder)
        return {
            "step": state["step"],
            "tokens": state["tokens"],
            "predicted_tokens": state.get("predicted_tokens"),  # older versions did not count them
            "bytes": sum(file["bytes"] for file in files.values()),
            "saved": (folder / MANIFEST).stat().st_mtime,
            "healthy": read_health(folder),
            "folder": str(folder),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"checkpoint {folder} is damaged ({error})") from None


def read_health(folder: Path) -> bool | None:
    """Whether loss and gradient norm were finite in its step and the next one; None: they were, but that step is yet to come."""
    try:
        return bool(json.loads((folder / HEALTH).read_text())["healthy"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        return None if read_state(folder).get("finite", True) else False
    except (OSError, ValueError, AttributeError):
        return None


def newest_healthy(root: Path) -> Path | None:
    """The newest complete checkpoint that is not known to be unhealthy."""
    folders = [folder_of(root, step) for step in reversed(complete_steps(root))]
    return next((folder for folder in folders if read_health(folder) is not False), None)


def write_health(folder: Path, healthy: bool) -> None:
    """See :func:`read_health`."""
    write_atomically(folder / HEALTH, to_json({"healthy": healthy}) + "\n")


def set_aside(folder: Path, why: str) -> Path:
    """Take a checkpoint out of the way of those that are saved and removed from now on -> where it is now."""
    aside = folder.with_name(f"{why}-{folder.name}")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    sync_folder(folder.parent)
    point_latest(folder.parent)
    return aside
