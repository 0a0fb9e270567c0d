"""The weights of a run: by their names in the whole model, as a checkpoint holds them, and back."""

from collections.abc import Sequence
from pathlib import Path

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import build_model, check_machine
from bitlm_dist.model.initialization import GATED, global_names, split_dimension
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.parallel.sliced import Sliced
from bitlm_dist.training.checkpoint_place import steps_of
from bitlm_dist.training.optimizer import AVERAGE
from bitlm_dist.training.run_folder import RunFolder


def model_tensors(chunks: Sequence[LanguageModel]) -> dict[str, Sliced]:
    """What this process holds of the weights, by the names that a checkpoint has for them."""
    tensors: dict[str, Sliced] = {}
    for chunk in chunks:
        for name, parameter in global_names(chunk, chunk.place.stage.layers.start):
            tensors |= saved_as(name, Sliced.whole(parameter), chunk.place.layout)
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


def saved_as(name: str, local: Sliced, layout: Layout) -> dict[str, Sliced]:
    """A tensor as a checkpoint of any layout knows it: shares of a split matrix, the two halves of a gated one apart."""
    dimension = split_dimension(name) if len(local.shape) == 2 else None
    if dimension is None:
        return {name: local}
    parts = {name: local}
    if name.endswith(GATED):
        rows = local.shape[0] // 2
        parts = {f"{name}.gate": local.rows(0, rows), f"{name}.up": local.rows(rows, 2 * rows)}
    return {n: part.along(dimension, layout.tensor_rank, layout.tensor) for n, part in parts.items()}


def load_trained(run: Path, config: Config) -> tuple[RunFolder, LanguageModel, int]:
    """The newest checkpoint of a run, for evaluation and generation -> (folder, model, step).

    Args:
        run: the run folder.
        config: its config, overrides applied.

    Raises:
        UserError: the folder holds no complete checkpoint.
    """
    folder = RunFolder(run)
    steps = steps_of(run)
    if not steps:
        raise UserError(f"{run} holds no checkpoint yet: train it with `bitlm train {run}/config.yaml`")
    check_machine(config)
    model = build_model(config, folder.codes(), eos=folder.tokenizer().eos).to(mesh.device())
    checkpoint = store.folder_of(folder.checkpoints, steps[-1])
    try:
        store.verify(checkpoint)
    except store.DamagedError as error:
        others = f"remove {checkpoint} to use step {steps[-2]}" if len(steps) > 1 else "there is no other"
        raise UserError(f"{error}: {others}") from error
    if config.evaluation.averaged and not config.optimizer.ema:
        raise UserError(f"evaluation.averaged = true: {run} was trained without optimizer.ema and has no average: set it false")
    saved = averaged_name if config.evaluation.averaged else weight_name
    tensor_files.read(checkpoint, {saved(n): t for n, t in model_tensors([model]).items()})
    return folder, model.eval(), steps[-1]
