"""Checkpoints: one folder each, complete or absent.

A folder is built under a temporary name, flushed, given a manifest with the size and SHA-256 of
every file, and renamed::

    checkpoints/
        step-00000120/
            rank-00000.safetensors …   shards of tensors (tensors.py)
            index.json                 which file holds which shard
            state.json                 step, tokens, data position and fingerprint, config, versions
            manifest.json              format; size and hash of every other file
            health.json                written once the step after it is known (retention.py)
        latest -> step-00000120

The format is independent of the layout that wrote it, and nothing in it is ever executed: tensors
are safetensors, the rest is JSON. Torch is imported by what writes tensors; to list and verify
checkpoints takes none.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from bitlm_dist.checkpoint.steps import (
    HEALTH,
    MANIFEST,
    STATE,
    complete_steps,
    folder_of,
    read_health,
    read_train_state,
)
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.files import fsync_folder, sha256_of, write_atomically
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from torch import Tensor

    from bitlm_dist.checkpoint.tensors import FileDigest, ShardEntry

FORMAT = 2
LATEST = "latest"
STALE_PATTERNS = (".*.partial", ".*.removed")  # leftovers of killed processes


class SaveError(UserError):
    """A checkpoint could not be written; earlier ones are unchanged."""


class DamagedError(UserError):
    """A checkpoint does not match its manifest, or its manifest cannot be read."""


def create_partial_folder(root: Path, step: int) -> Path:
    """Create the folder in which a checkpoint is built, and clean up after killed processes.

    The cleanup is best effort.
    """
    for stale in _stale_folders(root):
        if stale.is_symlink():
            stale.unlink(missing_ok=True)
        shutil.rmtree(stale, ignore_errors=True)

    partial_folder = partial_folder_of(root, step)
    partial_folder.mkdir(parents=True)
    fsync_folder(root.parent)
    return partial_folder


def _stale_folders(root: Path) -> list[Path]:
    return [path for pattern in STALE_PATTERNS for path in root.glob(pattern)]


def stale_bytes(root: Path) -> int:
    """Bytes that the next :func:`create_partial_folder` frees by cleaning up."""
    return sum(
        file.stat().st_size
        for folder in _stale_folders(root)
        for file in folder.rglob("*")
        if file.is_file()
    )


def partial_folder_of(root: Path, step: int) -> Path:
    """The folder in which a step's checkpoint is built."""
    return root / f".step-{step:08d}.partial"


def rank_file_name(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def finalize(
    root: Path,
    step: int,
    train_state: Mapping[str, Any],
    entries_per_rank: "Sequence[Sequence[ShardEntry]]",
    digests: "Iterable[FileDigest]",
) -> Path:
    """Complete a checkpoint, once all ranks have written their files.

    Args:
        root: The run's ``checkpoints`` folder.
        step: The checkpoint's step.
        train_state: JSON values.
        entries_per_rank: The shards that each rank has written.
        digests: Size and hash of each rank's file.

    Returns:
        The checkpoint's folder.
    """
    from bitlm_dist.checkpoint.tensors import INDEX, index_text

    partial_folder = partial_folder_of(root, step)
    final = folder_of(root, step)

    files = {rank_file_name(rank): digest._asdict() for rank, digest in enumerate(digests)}
    texts = {
        INDEX: index_text(
            {rank_file_name(rank): entries for rank, entries in enumerate(entries_per_rank)}
        ),
        STATE: to_json({"step": step, **train_state}, indent=1) + "\n",
    }
    for name, text in texts.items():
        write_atomically(partial_folder / name, text)
        files[name] = {
            "bytes": len(text.encode()),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }

    # Last: a folder with a manifest counts as complete.
    write_atomically(
        partial_folder / MANIFEST, to_json({"format": FORMAT, "files": files}, indent=1) + "\n"
    )
    if final.exists():  # incomplete, or a rerun of the same step
        remove(final)
    partial_folder.rename(final)
    fsync_folder(root)
    update_latest_link(root)
    return final


def update_latest_link(root: Path) -> None:
    """Point the link ``latest`` to the latest complete checkpoint.

    Best effort: the file system may lack links, or something else may have that name.
    """
    steps = complete_steps(root)
    link = root / f".{LATEST}"
    with suppress(OSError):
        link.unlink(missing_ok=True)
        if not steps:
            (root / LATEST).unlink(missing_ok=True)
            return

        # A rename replaces the old link atomically.
        link.symlink_to(folder_of(root, steps[-1]).name)
        link.rename(root / LATEST)


def discard(root: Path, step: int) -> None:
    """Remove what a failed save has written."""
    shutil.rmtree(partial_folder_of(root, step), ignore_errors=True)


def remove(folder: Path) -> Thread:
    """Remove a checkpoint in the background.

    It is renamed first, so that a half-removed checkpoint is never mistaken for a complete one.

    Returns:
        The thread that removes it.
    """
    hidden = folder.with_name(f".{folder.name}.{time.time_ns()}.removed")
    folder.rename(hidden)
    fsync_folder(folder.parent)

    thread = Thread(target=shutil.rmtree, args=(hidden, True), daemon=True, name="removal")
    thread.start()
    return thread


def save(
    root: Path,
    step: int,
    entries: "Sequence[ShardEntry]",
    tensors: "Iterable[Tensor]",
    train_state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint from a single process that holds all of it."""
    from bitlm_dist.checkpoint.tensors import write_safetensors

    digest = write_safetensors(
        create_partial_folder(root, step) / rank_file_name(0), entries, tensors
    )
    return finalize(root, step, train_state, [entries], [digest])


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        folder: The checkpoint.
        rank: Index of the first file to hash, in sorted order.
        world_size: Hash every ``world_size``-th file, so that the ranks share the work.

    Raises:
        DamagedError: A file is missing, unreadable or changed; the message names it.
        UserError: The checkpoint is incomplete or of another format.
    """
    files = read_manifest(folder)
    for name in sorted(files)[rank::world_size]:
        file = folder / name
        expected = files[name]
        try:
            # The size is cheap, and settles most damage without reading the file.
            if not file.is_file():
                raise DamagedError(f"checkpoint file {file} is missing")
            if os.path.getsize(file) != expected["bytes"] or sha256_of(file) != expected["sha256"]:
                raise DamagedError(f"checkpoint file {file} is damaged")
        except OSError as error:
            raise _unreadable(file, error) from error
        except (KeyError, TypeError):
            raise DamagedError(f"checkpoint file {folder / MANIFEST} is damaged") from None


def _unreadable(file: Path, error: OSError) -> DamagedError:
    reason = os_error_message(OSError(error.errno, error.strerror, os.fspath(file)))
    return DamagedError(f"checkpoint file {reason}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the size and hash of every file of a checkpoint, by file name.

    Raises:
        DamagedError: The manifest is missing or cannot be read.
        UserError: The checkpoint is of another format.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DamagedError(f"{folder} is no complete checkpoint: it has no {MANIFEST}")

    try:
        manifest = json.loads(file.read_text())
        format_version = int(manifest.get("format", 1))
        if format_version == FORMAT:
            return dict(manifest["files"])
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedError(f"checkpoint file {file} is damaged") from None

    advice = (
        "upgrade bitlm-dist" if format_version > FORMAT else "go on with the version that wrote it"
    )
    raise UserError(
        f"{folder} has format {format_version}, this version reads format {FORMAT}: {advice}"
    )


def checkpoint_summary(folder: Path) -> dict[str, Any]:
    """Step, tokens, size, time and health of a complete checkpoint, without reading its tensors.

    Raises:
        DamagedError: Its manifest or state is.
    """
    files = read_manifest(folder)
    try:
        state = read_train_state(folder)
        return {
            "step": state["step"],
            "tokens": state["tokens"],
            "predicted_tokens": state.get("predicted_tokens"),  # older versions did not count them
            "bytes": sum(file["bytes"] for file in files.values()),
            "saved": (folder / MANIFEST).stat().st_mtime,
            "healthy": read_health(folder),
            "folder": str(folder),
        }
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint {folder} is damaged: {error.filename} is missing") from None
    except OSError as error:
        raise _unreadable(folder / STATE, error) from error
    except (ValueError, KeyError, TypeError):
        raise DamagedError(
            f"checkpoint {folder} is damaged: {MANIFEST} or {STATE} lacks entries"
        ) from None


def latest_healthy(root: Path) -> Path | None:
    """The latest complete checkpoint that is not known to be unhealthy; None if there is none."""
    folders = [folder_of(root, step) for step in reversed(complete_steps(root))]
    return next((folder for folder in folders if read_health(folder) is not False), None)


def write_health(folder: Path, healthy: bool) -> None:
    """Record whether a checkpoint is healthy, see :func:`read_health`."""
    write_atomically(folder / HEALTH, to_json({"healthy": healthy}) + "\n")


def quarantine(folder: Path, reason: str) -> Path:
    """Rename a checkpoint, so that it is neither loaded nor deleted from now on.

    Args:
        folder: The checkpoint.
        reason: Prefix of the new name.

    Returns:
        The new path.
    """
    quarantined = folder.with_name(f"{reason}-{folder.name}")
    if quarantined.exists():
        shutil.rmtree(quarantined)

    folder.rename(quarantined)
    fsync_folder(folder.parent)
    update_latest_link(folder.parent)
    return quarantined
