"""The weights of a checkpoint as plain safetensors with all that is needed to use them, and back.

An exported folder has the files of a run folder, but for the checkpoints::

    model.safetensors, or model-00001-of-00003.safetensors … with model.safetensors.index.json
    config.yaml  tokenizer/  codes.npz
    export.json            step, tokens, versions; size and hash of every other file
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.tensors import NAMES, Entry, Stored
from bitlm_dist.config_loading import read_run, to_yaml
from bitlm_dist.errors import UserError
from bitlm_dist.files import sha256_of, sync_folder, sync_tree, to_json, write_atomically
from bitlm_dist.training.checkpoint_place import run_of
from bitlm_dist.training.run_folder import CODES, RunFolder, environment
from bitlm_dist.training.weights import averaged_name, weight_name

FORMAT = 1
RECORD, INDEX, WEIGHTS = "export.json", "model.safetensors.index.json", ".safetensors"


def export(checkpoint: Path, out: Path, averaged: bool = False, file_bytes: int = 4 * 10**9) -> int:
    """Write the weights of a checkpoint, one tensor in memory at a time -> bytes written.

    Args:
        checkpoint: in its run folder.
        out: must not exist.
        averaged: the moving average instead of the weights.
        file_bytes: at most so much in one file, unless a tensor is larger.

    Raises:
        UserError: the checkpoint is damaged or has no average, or ``out`` exists.
    """
    run = RunFolder(run_of(checkpoint))
    _refuse_existing(out)
    store.verify(checkpoint)
    state, index = store.read_state(checkpoint), tensor_files.read_index(checkpoint)
    names = _exported_names(index, averaged)
    if not names:
        raise UserError(f"{checkpoint} holds no moving average: export without --averaged, or train with optimizer.ema")
    entries = [Entry.whole(name, index[saved].dtype, index[saved].shape) for name, saved in names]
    groups = list(_in_files(entries, file_bytes))
    building = out.with_name(f".{out.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    saved_as, files = dict(names), {}
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        whole = (tensor_files.read_whole(checkpoint, saved_as[entry.name], index) for entry in group)
        files[file] = tensor_files.write(building / file, group, whole)._asdict()
    if len(groups) > 1:
        weight_map = {entry.name: file for file, group in zip(files, groups, strict=True) for entry in group}
        total = sum(entry.bytes for entry in entries)
        text = to_json({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        write_atomically(building / INDEX, text + "\n")
    write_atomically(building / "config.yaml", to_yaml(read_run(run.path)))  # its paths are not those of this folder
    shutil.copy(run.path / CODES, building)
    shutil.copytree(run.path / "tokenizer", building / "tokenizer")
    record = {"format": FORMAT, "step": state["step"], "tokens": state["tokens"], "averaged": averaged}
    for path in [building / "config.yaml", building / CODES, *(building / "tokenizer").iterdir()]:
        files[str(path.relative_to(building))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_atomically(building / RECORD, to_json({**record, "files": files, "environment": environment()}, indent=1) + "\n")
    sync_tree(building)
    building.rename(out)
    sync_folder(out.parent)
    return sum(file["bytes"] for name, file in files.items() if name.endswith(WEIGHTS))


def _exported_names(index: dict[str, Stored], averaged: bool) -> list[tuple[str, str]]:
    """Names of the model's tensors, each with what the checkpoint calls it."""
    start = weight_name("")
    names = [name.removeprefix(start) for name in index if name.startswith(start)]
    found = [(name, averaged_name(name) if averaged else weight_name(name)) for name in names]
    return found if all(saved in index for _, saved in found) else []


def _in_files(entries: Sequence[Entry], most: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        if group and sum(e.bytes for e in group) + entry.bytes > most:
            yield group
            group = []
        group.append(entry)
    yield group


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists: name a folder that does not")


def import_(source: Path, run: Path) -> None:
    """Make a run folder of an exported one, one tensor in memory at a time; it can be evaluated and written with.

    Args:
        source: what :func:`export` wrote.
        run: must not exist.

    Raises:
        UserError: ``source`` is no exported folder, is damaged or of a newer format, or ``run`` exists.
    """
    _refuse_existing(run)
    record = _read_record(source)
    config = read_run(source)
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": run}),
            "checkpoint": config.checkpoint.model_copy(update={"dir": None}),
            "evaluation": config.evaluation.model_copy(update={"averaged": False}),
        }
    )
    building = run.with_name(f".{run.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    folder = RunFolder(building)
    folder.claim(config, source / "tokenizer", RunFolder(source).codes())
    folder.record(config, source / "tokenizer", RunFolder(source).codes())
    files = [source / name for name in record["files"] if name.endswith(WEIGHTS)]
    state = {"tokens": record["tokens"], "weights_only": True}
    state |= {"config": config.model_dump(mode="json"), "environment": environment()}
    store.save(folder.checkpoints, record["step"], list(_entries_of(files)), _tensors_of(files), state)
    folder.release()
    building.rename(run)


def _entries_of(files: Sequence[Path]) -> Iterator[Entry]:
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in list(opened.keys()):
                part = opened.get_slice(name)
                yield Entry.whole(weight_name(name), NAMES[part.get_dtype()], part.get_shape())


def _tensors_of(files: Sequence[Path]) -> Iterator[Tensor]:
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in list(opened.keys()):
                yield opened.get_tensor(name)


def _read_record(source: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((source / RECORD).read_text())
        found, files = int(record["format"]), dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} is no exported folder: {RECORD} cannot be read ({error})") from None
    if found > FORMAT:
        raise UserError(f"{source} has export format {found}, this version reads up to {FORMAT}: upgrade bitlm-dist")
    for name, expected in files.items():
        file = source / name
        if not file.is_file():
            raise UserError(f"{file} is missing: export again")
        if sha256_of(file) != expected["sha256"]:
            raise UserError(f"{file} is damaged: export again")
    return record
