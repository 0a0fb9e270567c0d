"""Checkpoints: one folder each, complete or absent.

Tensors are written by torch.distributed.checkpoint, keyed by parameter name with global shapes, so the format does not know the
layout that wrote it. A folder is built beside its place, flushed, given a manifest with the size and SHA-256 of every file, and
renamed::

    checkpoints/step-00000120/
        tensors/         torch.distributed.checkpoint
        state.json       step, tokens, position in the data, fingerprint, versions
        manifest.json    size and hash of every other file
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from bitlm_dist.errors import UserError
from bitlm_dist.files import sync_folder, write_atomically
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ALONE, Layout

FORMAT = 1
MANIFEST = "manifest.json"


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return root / f"step-{step:08d}"


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return sorted(int(path.parent.name[5:]) for path in root.glob(f"step-*/{MANIFEST}"))


class SaveError(UserError):
    """A checkpoint could not be written; those before it are as they were."""


def _on_first(layout: Layout, action: Callable[[], None]) -> None:
    """Rank 0 does it; where that fails every rank raises :class:`SaveError`, so that none waits for the others."""
    problem = ""
    if layout.rank == 0:
        try:
            action()
        except OSError as error:
            problem = str(error)
    failed = torch.tensor(bool(problem), dtype=torch.int32, device=mesh.device())
    if int(mesh.most_of_all(failed) if layout.world > 1 else failed):
        raise SaveError(problem or "rank 0 could not write")


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Every rank its part; if one fails, all raise :class:`SaveError`."""
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        save_tensors(dict(tensors), storage_writer=writer, no_dist=layout.world == 1)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise SaveError(f"rank {rank}: {_first_cause(cause)}") from error


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong first: torch's writer stumbles over a file that the disk had no room for, and says only that."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    layout: Layout = ALONE,
) -> Path:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``; every process of the layout calls it.

    Args:
        root: the run's ``checkpoints`` folder.
        tensors: by name; saved with shape and dtype. A name that several processes give is the same tensor, or shares of it.
        state: JSON values.

    Raises:
        SaveError: on every rank, if one could not write.
    """
    final = folder_of(root, step)
    building = root / f".{final.name}.partial"

    def prepare() -> None:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)

    def finish() -> None:
        _complete(building, final, step, state)
        for old in complete_steps(root)[:-keep]:
            shutil.rmtree(folder_of(root, old))

    try:
        _on_first(layout, prepare)
        _write_tensors(building / "tensors", tensors, layout)
        _on_first(layout, finish)
    except SaveError as error:
        if layout.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
        free = shutil.disk_usage(root.parent).free / 2**20
        raise SaveError(f"{final} could not be written, {free:,.0f} MiB are free there: {error}") from error
    return final


def _complete(building: Path, final: Path, step: int, state: Mapping[str, Any]) -> None:
    """All tensors are written: describe the folder and put it in its place."""
    write_atomically(building / "state.json", json.dumps({"format": FORMAT, "step": step, **state}, indent=1) + "\n")
    files = {str(f.relative_to(building)): _describe(f) for f in sorted(building.rglob("*")) if f.is_file()}
    write_atomically(building / MANIFEST, json.dumps(files, indent=1) + "\n")
    if final.exists():  # incomplete, or a rerun of the same step
        shutil.rmtree(final)
    building.rename(final)
    sync_folder(final.parent)


def read_state(folder: Path) -> dict[str, Any]:
    """Verify every file of a checkpoint against its manifest and return its JSON state.

    Raises:
        UserError: it is incomplete, a file is missing or damaged, or its format is newer than this version.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is no complete checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        raise UserError(f"checkpoint file {folder / MANIFEST} is damaged: {_remedy(folder)}") from None
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"checkpoint file {file} is missing: {_remedy(folder)}")
        if _describe(file) != expected:
            raise UserError(f"checkpoint file {file} is damaged: {_remedy(folder)}")
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if state["format"] > FORMAT:
        raise UserError(f"{folder} has format {state['format']}, this version reads up to {FORMAT}: upgrade bitlm-dist")
    return state


def describe(folder: Path) -> dict[str, Any]:
    """Step, tokens, size and time of a complete checkpoint, without reading its tensors.

    Raises:
        UserError: its description is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        state = json.loads((folder / "state.json").read_text())
        size = sum(file["bytes"] for file in manifest.values())
        saved = (folder / MANIFEST).stat().st_mtime
        return {"step": state["step"], "tokens": state["tokens"], "bytes": size, "saved": saved, "folder": str(folder)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder} is damaged ({error}): {_remedy(folder)}") from None


def _remedy(folder: Path) -> str:
    return f"remove {folder} to go on from an older checkpoint"


def load(folder: Path, tensors: Mapping[str, Tensor], layout: Layout = ALONE) -> None:
    """Copy the tensors of a checkpoint that :func:`read_state` has verified into ``tensors``; every process takes its part.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    reader = FileSystemReader(folder / "tensors")
    saved = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        shape = getattr(saved.get(name), "size", None)
        if shape != tensor.shape:
            found = "is missing" if shape is None else f"has shape {tuple(shape)}"
            raise UserError(f"{folder}: {name} {found}, the model has {tuple(tensor.shape)}: it is a checkpoint of another model")
    load_tensors(dict(tensors), storage_reader=reader, no_dist=layout.world == 1)


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": os.path.getsize(file), "sha256": digest}
