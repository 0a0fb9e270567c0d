"""Initial weights that are identical on every parallel layout.

Each full tensor is drawn from a generator that is seeded by the run's seed and the tensor's global
name, and is then sharded.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


def make_generator(seed: int, name: str) -> torch.Generator:
    """Create the random generator of one named tensor."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.no_grad()
def initialize_layers(
    module: nn.Module, first_layer: int, num_layers: int, seed: int, rank: int, num_ranks: int
) -> None:
    """Initialize the matrices of a stage's Megatron layers; norm weights stay one.

    Args:
        module: named as in the full model, except for its layer indices.
        first_layer: index of the stage's first layer in the full model.
        num_layers: number of layers of the full model.
        seed: seed of the run.
        rank, num_ranks: rank within the tensor-parallel group, and the size of the group.
    """
    for name, parameter in global_named_parameters(module, first_layer):
        if parameter.dim() < 2 or parameter.is_meta or "block.layers." not in name:
            continue

        dim = shard_dim(name)
        shape = [size * (num_ranks if i == dim else 1) for i, size in enumerate(parameter.shape)]
        std = INIT_STD / math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_WEIGHTS) else INIT_STD

        # Every rank draws the full tensor, so that the values do not depend on the layout.
        full = torch.empty(shape).normal_(0.0, std, generator=make_generator(seed, name))
        parameter.copy_(shard(name, full, rank, num_ranks))


@contextmanager
def seeded_init(seed: int, name: str) -> Iterator[None]:
    """While open, seed torch's global generator from ``seed`` and ``name``; restore it on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(make_generator(seed, name).initial_seed())
        yield
