"""Initial weights that are identical on every parallel layout, and on every device.

Modules declare the distributions of their parameters and leave these unset. :func:`draw_weights`
draws a rank's shards, where no checkpoint follows.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.kernels import skinny_linear
from bitlm_dist.model import counter_random

INIT_STD = 0.02  # of the backbone's matrices
# These write to the residual stream, so their std is divided by sqrt(2 · layers).
RESIDUAL_WEIGHTS = ("linear_proj.weight", "linear_fc2.weight")
SHARD_DIMS = {
    "linear_qkv.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}
SHARD_DIMS |= {"embedding.rows": 0, "output.rows": 0}  # the tables of a softmax
# Elements drawn at once: few on a CPU, so that they stay in its cache.
MAX_DRAWN_NUMEL = {"cpu": 2**17, "cuda": 2**22}
# A rank holds its shard of the gate, stacked on its shard of the up projection.
GATED_WEIGHT = "linear_fc1.weight"


def global_named_parameters(
    module: nn.Module, first_layer: int
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the named parameters of a stage under their names in the full model.

    Args:
        first_layer: index of the stage's first layer in the full model.
    """
    for name, parameter in module.named_parameters():
        head, mark, rest = name.partition("block.layers.")
        if mark:
            number, _, tail = rest.partition(".")
            name = f"{head}{mark}{int(number) + first_layer}.{tail}"
        yield name, parameter


def shard_dim(name: str) -> int | None:
    """Dimension along which a parameter is sharded over the tensor ranks; None: replicated."""
    return next((dim for ending, dim in SHARD_DIMS.items() if name.endswith(ending)), None)


def shard(name: str, full: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Return the shard of a tensor-parallel rank."""
    dim = shard_dim(name)
    if dim is None:
        return full

    # Gate and up projection are sharded separately, so that a rank can multiply its own halves.
    if name.endswith(GATED_WEIGHT):
        return full.unflatten(0, (2, -1)).chunk(num_ranks, 1)[rank].flatten(0, 1)
    return full.chunk(num_ranks, dim)[rank]


def unshard(name: str, shards: list[Tensor]) -> Tensor:
    """Reassemble the full tensor: the inverse of :func:`shard`."""
    dim = shard_dim(name)
    if dim is None:
        return shards[0]

    if name.endswith(GATED_WEIGHT):
        return torch.cat([shard.unflatten(0, (2, -1)) for shard in shards], 1).flatten(0, 1)
    return torch.cat(shards, dim)


class InitialDistribution(NamedTuple):
    """Distribution of a parameter's initial elements: :func:`normal` or :func:`uniform`."""

    sample: Callable[[Tensor], Tensor]  # maps random words to numbers of scale 1
    scale: float


def normal(std: float) -> InitialDistribution:
    """Normal distribution with mean zero."""
    return InitialDistribution(counter_random.normal, std)


def uniform(bound: float) -> InitialDistribution:
    """Uniform distribution between -bound and +bound."""
    return InitialDistribution(counter_random.uniform, bound)


def set_distribution(parameter: nn.Parameter, distribution: InitialDistribution) -> nn.Parameter:
    """Have :func:`draw_weights` draw a parameter; the others keep the values they are built with.

    Returns:
        The parameter.
    """
    parameter.initial_distribution = distribution  # type: ignore[attr-defined]
    return parameter


def random_parameter(*shape: int, distribution: InitialDistribution) -> nn.Parameter:
    """Build a parameter that is unset until :func:`draw_weights`, or a checkpoint, sets it."""
    return set_distribution(nn.Parameter(torch.empty(shape)), distribution)


class Linear(skinny_linear.Linear):
    """Linear map with torch's initial distribution, unset until :func:`draw_weights`."""

    @override
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            set_distribution(parameter, uniform(1 / math.sqrt(self.in_features)))


class Embedding(nn.Embedding):
    """Table with one row per token, unset until :func:`draw_weights`."""

    @override
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            set_distribution(parameter, normal(INIT_STD))


def zero_linear(layer: Linear) -> Linear:
    """Have weight and bias of a linear map start at zero.

    Returns:
        The map.
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
        del parameter.initial_distribution  # type: ignore[attr-defined]
    return layer


def set_layer_distributions(block: nn.Module, num_layers: int) -> None:
    """Set the distributions of the matrices of Megatron's layers; norm weights start at one.

    Args:
        block: the layers of a stage.
        num_layers: number of layers of the full model.
    """
    for name, parameter in block.named_parameters():
        if parameter.dim() == 2:
            is_residual = name.endswith(RESIDUAL_WEIGHTS)
            std = INIT_STD / math.sqrt(2 * num_layers) if is_residual else INIT_STD
            set_distribution(parameter, normal(std))


@torch.no_grad()
def draw_weights(
    module: nn.Module, seed: int, first_layer: int = 0, rank: int = 0, num_ranks: int = 1
) -> None:
    """Draw the parameters that have an initial distribution, in place and on their device.

    An element depends on the seed, its tensor's name in the full model, and its row and column in
    the full tensor alone. So a rank draws no more than its shards.

    Args:
        module: named as in the full model, except for its layer indices.
        seed: seed of the run.
        first_layer: index of the module's first layer in the full model.
        rank, num_ranks: rank within the tensor-parallel group, and the size of the group.
    """
    for name, parameter in global_named_parameters(module, first_layer):
        distribution = getattr(parameter, "initial_distribution", None)
        if distribution is None:
            continue

        matrix = parameter.view(-1, parameter.shape[-1])
        dim = shard_dim(name)
        rows = torch.arange(len(matrix) * (num_ranks if dim == 0 else 1), device=matrix.device)
        first_column = 0
        if dim == 0:
            rows = shard(name, rows, rank, num_ranks)
        elif dim == 1:
            first_column = rank * matrix.shape[1]

        num_columns = matrix.shape[1] * (num_ranks if dim == 1 else 1)
        _draw(matrix, distribution, _key(seed, name), rows, first_column, num_columns)


def _key(seed: int, name: str) -> int:
    """The key of a tensor's random numbers, 64 bits."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _draw(
    matrix: Tensor,
    distribution: InitialDistribution,
    key: int,
    rows: Tensor,
    first_column: int,
    num_columns: int,
) -> None:
    """Draw a part of a full matrix, a few rows at a time.

    Args:
        matrix: the part, [R, C].
        distribution: of its elements.
        key: of the full matrix.
        rows: indices of the part's rows in the full matrix, int64 [R].
        first_column: index of its first column there.
        num_columns: number of columns of the full matrix.
    """
    # Two columns share an output of the generator; a part may begin or end between them.
    last_column = first_column + matrix.shape[1]
    pairs = torch.arange(first_column // 2, -(-last_column // 2), device=matrix.device)
    num_pairs_per_row = -(-num_columns // 2)
    columns = slice(first_column % 2, first_column % 2 + matrix.shape[1])

    num_rows = max(1, MAX_DRAWN_NUMEL[matrix.device.type] // matrix.shape[1])
    for part, part_rows in zip(matrix.split(num_rows), rows.split(num_rows), strict=True):
        words = counter_random.random_words(key, part_rows[:, None] * num_pairs_per_row + pairs)
        part.copy_(distribution.sample(words)[:, columns].mul_(distribution.scale))
