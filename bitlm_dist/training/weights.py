"""The weights of a run: their names and shards in a checkpoint, and loading a trained model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.steps import folder_of
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import build_model, prepare_device
from bitlm_dist.model.initialization import GATED_WEIGHT, global_named_parameters, shard_dim
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.model.transformer_engine import without_fp8
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training.optimizer import EMA_SLOT
from bitlm_dist.training.run_folder import RunFolder
from bitlm_dist.training.trained_files import check_same_model, find_trained_steps


def model_state_dict(chunks: Sequence[LanguageModel]) -> dict[str, ShardedTensor]:
    """This rank's shards of the weights, by global name.

    Args:
        chunks: The model chunks of this rank.
    """
    tensors: dict[str, ShardedTensor] = {}
    for chunk in chunks:
        for name, parameter in global_named_parameters(
            chunk, chunk.pipeline_stage.model_chunk.layer_range.start
        ):
            tensors |= checkpoint_shards(
                name, ShardedTensor.from_full(parameter), chunk.pipeline_stage.layout
            )
    return tensors


def checkpoint_weight_name(name: str) -> str:
    """The name of a weight in a checkpoint."""
    return f"model.{name}"


def checkpoint_slot_name(name: str, slot: str) -> str:
    """The name of a slot of a weight's optimizer state in a checkpoint."""
    return f"optimizer.{name}.{slot}"


def checkpoint_ema_name(name: str) -> str:
    """The name of a weight's moving average in a checkpoint."""
    return checkpoint_slot_name(name, EMA_SLOT)


def is_checkpoint_weight(name: str) -> bool:
    """True for names that :func:`checkpoint_weight_name` makes."""
    return name.startswith("model.")


def is_checkpoint_ema(name: str) -> bool:
    """True for names that :func:`checkpoint_ema_name` makes."""
    return name.startswith("optimizer.") and name.endswith(f".{EMA_SLOT}")


def checkpoint_shards(
    name: str, local: ShardedTensor, layout: ParallelLayout
) -> dict[str, ShardedTensor]:
    """Describe a local tensor independently of the layout, as checkpoints store it.

    Args:
        name: The tensor's global name.
        local: What this rank holds of it.
        layout: The job's parallel layout.

    Returns:
        The tensor as a shard of the full one, by its name in a checkpoint; a gated weight as two
        tensors, ``NAME.gate`` and ``NAME.up``.
    """
    dimension = shard_dim(name) if len(local.shape) == 2 else None
    if dimension is None:
        return {name: local}

    shards = {name: local}
    # Every tensor-parallel rank holds rows of both halves, so its rows are no range of the full
    # matrix, but of each half they are.
    if name.endswith(GATED_WEIGHT):
        rows = local.shape[0] // 2
        shards = {
            f"{name}.gate": local.slice_rows(0, rows),
            f"{name}.up": local.slice_rows(rows, 2 * rows),
        }

    return {
        n: part.as_shard_of(dimension, layout.tensor_rank, layout.tensor)
        for n, part in shards.items()
    }


def training_tensors(
    weights: Mapping[str, ShardedTensor],
    optimizer_state: Mapping[str, ShardedTensor],
    layout: ParallelLayout,
) -> dict[str, ShardedTensor]:
    """Weights and optimizer state by their names in a checkpoint.

    Args:
        weights: This rank's shards of the weights, by global name.
        optimizer_state: Its shards of the optimizer state, by ``NAME.SLOT``.
        layout: The job's parallel layout.
    """
    tensors = {checkpoint_weight_name(name): tensor for name, tensor in weights.items()}
    for name, tensor in optimizer_state.items():
        parameter, _, slot = name.rpartition(".")
        tensors |= {
            checkpoint_slot_name(n, slot): t
            for n, t in checkpoint_shards(parameter, tensor, layout).items()
        }
    return tensors


def load_trained_model(run: Path, config: Config) -> tuple[RunFolder, LanguageModel, int]:
    """Load the latest checkpoint of a run for evaluation or generation; in bf16 if fp8 trained it.

    Args:
        run: The run folder.
        config: The run's config, with overrides applied.

    Returns:
        The run folder, the model in eval mode, and the checkpoint's step.

    Raises:
        UserError: The folder holds no complete checkpoint, or the latest one is damaged or has no
            moving averages although ``evaluation.use_ema`` asks for them.
    """
    folder = RunFolder(run)
    steps = find_trained_steps(run, config)

    config = without_fp8(config)
    prepare_device(config)
    codes = folder.codes()
    eos = folder.tokenizer().eos
    with mesh.device():
        model = build_model(config, codes, eos, initialize=False).to(mesh.device())

    checkpoint = folder_of(folder.checkpoints, steps[-1])
    try:
        store.verify(checkpoint)
    except store.DamagedError as error:
        others = (
            f"remove {checkpoint} to use step {steps[-2]}"
            if len(steps) > 1
            else "the run has no other checkpoint: restore the file from a backup"
        )
        raise UserError(f"{error}: {others}") from error
    check_same_model(run, config, checkpoint)

    # The averages are stored beside the weights, so either can be loaded into the model.
    is_used, checkpoint_name = (
        (is_checkpoint_ema, checkpoint_ema_name)
        if config.evaluation.use_ema
        else (is_checkpoint_weight, checkpoint_weight_name)
    )
    index = tensor_files.read_index(checkpoint)
    tensor_files.load_shards(
        checkpoint,
        {checkpoint_name(n): t for n, t in model_state_dict([model]).items()},
        {name: stored for name, stored in index.items() if is_used(name)},
    )
    return folder, model.eval(), steps[-1]


def load_job_shards(
    checkpoint: Path, tensors: Mapping[str, ShardedTensor], layout: ParallelLayout
) -> None:
    """Load this rank's shards of a checkpoint of the whole job. Collective.

    Args:
        checkpoint: The checkpoint.
        tensors: What this rank holds of weights and optimizer state, by name in the checkpoint.
        layout: The job's parallel layout.

    Raises:
        UserError: As :func:`~bitlm_dist.checkpoint.tensors.load_shards` does; a tensor that no rank
            holds counts as not wanted, on all ranks.
    """
    index = tensor_files.read_index(checkpoint)
    if layout.world_size > 1:
        # One flag per tensor: a rank of a pipeline holds few of the names, and many ranks the same.
        names = sorted(index)
        flags = torch.tensor([name in tensors for name in names], dtype=torch.uint8)
        held = mesh.all_reduce_max(flags.to(mesh.device())).tolist()
        wanted = {name for name, is_held in zip(names, held, strict=True) if is_held}
        tensor_files.check_all_wanted(checkpoint, index, wanted)
        index = {name: stored for name, stored in index.items() if name in tensors}

    tensor_files.load_shards(checkpoint, tensors, index)
