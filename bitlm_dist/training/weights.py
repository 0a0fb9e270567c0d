"""The weights of a run: their names and shards in a checkpoint, and loading a trained model."""

from collections.abc import Sequence
from pathlib import Path

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.steps import folder_of
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import build_model, prepare_device
from bitlm_dist.model.initialization import GATED_WEIGHT, global_named_parameters, shard_dim
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training.checkpoint_folder import checkpoint_steps
from bitlm_dist.training.optimizer import EMA_SLOT
from bitlm_dist.training.run_folder import RunFolder


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


def load_trained_model(run: Path, config: Config) -> tuple[RunFolder, LanguageModel, int]:
    """Load the latest checkpoint of a run for evaluation or generation.

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
    steps = checkpoint_steps(run)
    if not steps:
        raise UserError(
            f"{run} holds no checkpoint yet: train it with `bitlm train {run}/config.yaml`"
        )

    prepare_device(config)
    model = build_model(config, folder.codes(), eos=folder.tokenizer().eos).to(mesh.device())

    checkpoint = folder_of(folder.checkpoints, steps[-1])
    try:
        store.verify(checkpoint)
    except store.DamagedError as error:
        others = (
            f"remove {checkpoint} to use step {steps[-2]}"
            if len(steps) > 1
            else "there is no other"
        )
        raise UserError(f"{error}: {others}") from error

    if config.evaluation.use_ema and not config.optimizer.ema:
        raise UserError(
            f"evaluation.use_ema = true: {run} was trained without optimizer.ema "
            "and has no average: set it false"
        )

    # The averages are stored beside the weights, so either can be loaded into the model.
    checkpoint_name = checkpoint_ema_name if config.evaluation.use_ema else checkpoint_weight_name
    tensor_files.load_shards(
        checkpoint, {checkpoint_name(n): t for n, t in model_state_dict([model]).items()}
    )
    return folder, model.eval(), steps[-1]
