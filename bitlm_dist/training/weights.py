"""The weights of a run: by their names in the whole model, as a checkpoint holds them, and back."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bitlm_dist.checkpoint import store
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import build_model, check_machine
from bitlm_dist.model.initialization import GATED, global_names, split_dimension
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.training.optimizer import AVERAGE
from bitlm_dist.training.run_folder import RunFolder


def model_tensors(chunks: Sequence[LanguageModel]) -> dict[str, Tensor]:
    """The weights of this process by their names in the whole model, as a checkpoint holds them."""
    tensors: dict[str, Tensor] = {}
    for chunk in chunks:
        for name, parameter in global_names(chunk, chunk.place.stage.layers.start):
            tensors |= saved_as(name, parameter.detach(), chunk.place.layout)
    return tensors


def weight_name(name: str) -> str:
    """What a checkpoint calls a weight."""
    return f"model.{name}"


def state_name(name: str, slot: str) -> str:
    """What a checkpoint calls a slot of a weight's optimizer state."""
    return f"optimizer.{name}.{slot}"


def averaged_name(name: str) -> str:
    """What a checkpoint calls a weight's moving average."""
    return state_name(name, AVERAGE)


def saved_as(name: str, tensor: Tensor, layout: Layout) -> dict[str, Tensor]:
    """A tensor as views that a checkpoint of any layout knows: shares of a split matrix, the two halves of a gated one apart."""
    dimension = split_dimension(name) if tensor.dim() == 2 else None
    if dimension is None:
        return {name: tensor}
    halves = tensor.unflatten(0, (2, -1)) if name.endswith(GATED) else [tensor]
    names = [f"{name}.{part}" for part in ("gate", "up")] if name.endswith(GATED) else [name]
    return {n: mesh.share_of(half, dimension, layout) for n, half in zip(names, halves, strict=True)}


def load_trained(run: Path, config: Config) -> tuple[RunFolder, LanguageModel, int]:
    """The newest checkpoint of a run, for evaluation and generation -> (folder, model, step).

    Args:
        run: the run folder.
        config: its config, overrides applied.

    Raises:
        UserError: the folder holds no complete checkpoint.
    """
    folder = RunFolder(run)
    steps = store.complete_steps(folder.checkpoints)
    if not steps:
        raise UserError(f"{run} holds no checkpoint yet: train it with `bitlm train {run}/config.yaml`")
    check_machine(config)
    model = build_model(config, folder.codes(), eos=folder.tokenizer().eos).to(mesh.device())
    checkpoint = store.folder_of(folder.checkpoints, steps[-1])
    store.read_state(checkpoint)
    if config.evaluation.averaged and not config.optimizer.ema:
        raise UserError(f"evaluation.averaged = true: {run} was trained without optimizer.ema and has no average: set it false")
    saved = averaged_name if config.evaluation.averaged else weight_name
    store.load(checkpoint, {saved(n): t for n, t in model_tensors([model]).items()})
    return folder, model.eval(), steps[-1]
