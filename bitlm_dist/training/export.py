"""Export the weights of a checkpoint as plain safetensors with all that is needed to use them.

An exported folder has the files of a run folder, except for the checkpoints::

    model.safetensors      or model-00001-of-00003.safetensors … and model.safetensors.index.json
    config.yaml  tokenizer/  codes.npz
    export.json            step, tokens, versions; size and hash of every other file

:func:`import_checkpoint` makes a run folder of it.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.steps import read_train_state
from bitlm_dist.checkpoint.tensors import TORCH_DTYPES, ShardEntry, TensorIndex, current_name
from bitlm_dist.config_loading import load_run_config, to_yaml
from bitlm_dist.errors import UserError
from bitlm_dist.files import (
    fsync_folder,
    fsync_tree,
    missing_folders,
    remove_empty_folders,
    sha256_of,
    write_atomically,
)
from bitlm_dist.paths import check_absent
from bitlm_dist.strict_json import to_json
from bitlm_dist.training.checkpoint_folder import run_folder_of
from bitlm_dist.training.export_record import EXPORT_FORMAT, EXPORT_RECORD, load_verified_record
from bitlm_dist.training.run_folder import RunFolder, environment
from bitlm_dist.training.trained_files import CODES, TOKENIZER
from bitlm_dist.training.weights import checkpoint_ema_name, checkpoint_weight_name

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_SUFFIX = ".safetensors"


def export_checkpoint(
    checkpoint: Path, out: Path, use_ema: bool = False, max_file_bytes: int = 4 * 10**9
) -> int:
    """Write the weights of a checkpoint, with one tensor in memory at a time.

    Args:
        checkpoint: the checkpoint, in its run folder.
        out: the folder to write; must not exist.
        use_ema: export the moving average instead of the weights.
        max_file_bytes: maximum size of a file, unless a single tensor is larger.

    Returns:
        Bytes of weights written.

    Raises:
        UserError: the checkpoint is damaged or has no moving average, or ``out`` exists.
    """
    run = RunFolder(run_folder_of(checkpoint))
    with _built_folder(out) as building:
        store.verify(checkpoint)
        state = read_train_state(checkpoint)

        index = tensor_files.read_index(checkpoint)
        names = _exported_names(index, use_ema)
        if not names:
            raise UserError(
                f"{checkpoint} holds no moving average: export without --averaged, "
                "or train with optimizer.ema"
            )

        files = _write_weights(building, checkpoint, names, index, max_file_bytes)
        files |= _write_run_files(building, run)
        record = {
            "format": EXPORT_FORMAT,
            "step": state["step"],
            "tokens": state["tokens"],
            "averaged": use_ema,
        }
        write_atomically(
            building / EXPORT_RECORD,
            to_json({**record, "files": files, "environment": environment()}, indent=1) + "\n",
        )
        fsync_tree(building)

    return sum(file["bytes"] for name, file in files.items() if name.endswith(WEIGHTS_SUFFIX))


@contextmanager
def _built_folder(folder: Path) -> Iterator[Path]:
    """Build a folder under a temporary name, and rename it when it is complete.

    The temporary folder is made before the work, which may take long, and removed if the work
    fails, together with the parents that were made for it.

    Raises:
        UserError: ``folder`` exists.
        OSError: it cannot be made or written; the error names it.
    """
    check_absent(folder)
    building = folder.with_name(f".{folder.name}.partial")
    created = missing_folders(folder.parent)

    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        yield building
        building.rename(folder)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        remove_empty_folders(created)

        # the user knows the folder, not its temporary name
        reason = error.__cause__ if isinstance(error, UserError) else error
        if isinstance(reason, OSError) and reason.errno and _is_about(reason, building):
            raise OSError(reason.errno, reason.strerror, os.fspath(folder)) from error
        raise

    fsync_folder(folder.parent)


def _is_about(error: OSError, folder: Path) -> bool:
    """Whether an error is about a folder or a file in it; a write to a full disk names no file."""
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(folder)


def _write_weights(
    folder: Path,
    checkpoint: Path,
    names: Sequence[tuple[str, str]],
    index: dict[str, TensorIndex],
    max_file_bytes: int,
) -> dict[str, Any]:
    """Write the safetensors files and, if there are several, their index.

    Returns:
        Size and hash of each safetensors file, by name.
    """
    entries = [
        ShardEntry.full(name, index[saved].dtype, index[saved].shape) for name, saved in names
    ]
    groups = list(_group_into_files(entries, max_file_bytes))

    checkpoint_names = dict(names)
    files: dict[str, Any] = {}
    for number, group in enumerate(groups, 1):
        file = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        # a generator, so that one tensor is in memory at a time
        tensors = (
            tensor_files.load_full(checkpoint, checkpoint_names[entry.name], index)
            for entry in group
        )
        files[file] = tensor_files.write_safetensors(folder / file, group, tensors)._asdict()

    if len(groups) > 1:
        weight_map = {
            entry.name: file for file, group in zip(files, groups, strict=True) for entry in group
        }
        total = sum(entry.num_bytes for entry in entries)
        text = to_json({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        write_atomically(folder / INDEX_FILE, text + "\n")

    return files


def _write_run_files(folder: Path, run: RunFolder) -> dict[str, Any]:
    """Write config, codes and tokenizer of a run.

    Returns:
        Size and hash of each file, by its path in the folder.
    """
    # not a copy: paths in the run folder's config are relative to that folder
    write_atomically(folder / "config.yaml", to_yaml(load_run_config(run.path)))
    shutil.copy(run.path / CODES, folder)
    shutil.copytree(run.path / TOKENIZER, folder / TOKENIZER)

    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in [folder / "config.yaml", folder / CODES, *(folder / TOKENIZER).iterdir()]
    }


def _exported_names(index: dict[str, TensorIndex], use_ema: bool) -> list[tuple[str, str]]:
    """Pairs of a weight's name in the model and the checkpoint's name for what is exported of it.

    Empty if some of the exported tensors are not in the checkpoint.
    """
    start = checkpoint_weight_name("")
    names = [name.removeprefix(start) for name in index if name.startswith(start)]

    name_pairs = [
        (name, checkpoint_ema_name(name) if use_ema else checkpoint_weight_name(name))
        for name in names
    ]
    return name_pairs if all(saved in index for _, saved in name_pairs) else []


def _group_into_files(
    entries: Sequence[ShardEntry], max_file_bytes: int
) -> Iterator[list[ShardEntry]]:
    """Split the tensors, in order, into groups of at most ``max_file_bytes``."""
    group: list[ShardEntry] = []
    for entry in entries:
        if group and sum(e.num_bytes for e in group) + entry.num_bytes > max_file_bytes:
            yield group
            group = []
        group.append(entry)

    yield group


def import_checkpoint(source: Path, run: Path) -> None:
    """Make a run folder of an exported one, with one tensor in memory at a time.

    The run folder can be evaluated and sampled from. It has no optimizer state, so it cannot resume
    training.

    Args:
        source: a folder written by :func:`export_checkpoint`.
        run: the run folder to write; must not exist.

    Raises:
        UserError: ``source`` is not an exported folder, is damaged or of a newer format, or ``run``
            exists.
    """
    check_absent(run)
    record = load_verified_record(source)

    # the exporting run's paths mean nothing here, and no moving average is exported beside weights
    config = load_run_config(source)
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": run}),
            "checkpoint": config.checkpoint.model_copy(update={"dir": None}),
            "evaluation": config.evaluation.model_copy(update={"use_ema": False}),
        }
    )

    with _built_folder(run) as building:
        folder = RunFolder(building)
        folder.acquire(config, source / TOKENIZER, RunFolder(source).codes())
        folder.write_metadata(config, source / TOKENIZER, RunFolder(source).codes())

        files = [source / name for name in record["files"] if name.endswith(WEIGHTS_SUFFIX)]
        state = {"tokens": record["tokens"], "weights_only": True}
        state |= {"config": config.model_dump(mode="json"), "environment": environment()}
        store.save(
            folder.checkpoints,
            record["step"],
            list(_iter_entries(files)),
            _iter_tensors(files),
            state,
        )
        folder.release()


def _iter_entries(files: Sequence[Path]) -> Iterator[ShardEntry]:
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in list(opened.keys()):
                tensor_slice = opened.get_slice(name)
                yield ShardEntry.full(
                    current_name(checkpoint_weight_name(name)),
                    TORCH_DTYPES[tensor_slice.get_dtype()],
                    tensor_slice.get_shape(),
                )


def _iter_tensors(files: Sequence[Path]) -> Iterator[Tensor]:
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in list(opened.keys()):
                yield opened.get_tensor(name)
