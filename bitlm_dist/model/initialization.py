"""Initial weights that are the same on every layout: each tensor is drawn whole, from the seed and its global name, and then cut.

Legend: T tensor-parallel ranks.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

STD = 0.02  # of the backbone's matrices; those that write to the residual stream: divided by sqrt(2 · layers)
RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
SPLIT = {"linear_qkv.weight": 0, "linear_proj.weight": 1, "linear_fc1.weight": 0, "linear_fc2.weight": 1}
SPLIT |= {"embedding.rows": 0, "output.rows": 0}  # a softmax's tables
GATED = "linear_fc1.weight"  # a rank holds its share of the gate above its share of the other half


def global_names(module: nn.Module, first_layer: int) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of a stage, its layers numbered from ``first_layer`` as in the whole model."""
    for name, parameter in module.named_parameters():
        head, mark, rest = name.partition("block.layers.")
        if mark:
            number, _, tail = rest.partition(".")
            name = f"{head}{mark}{int(number) + first_layer}.{tail}"
        yield name, parameter


def split_dimension(name: str) -> int | None:
    """Along which dimension a parameter is split over the tensor ranks; None: every rank holds it whole."""
    return next((dimension for ending, dimension in SPLIT.items() if name.endswith(ending)), None)


def cut(name: str, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """The share of a tensor rank."""
    dimension = split_dimension(name)
    if dimension is None:
        return whole
    if name.endswith(GATED):
        return whole.unflatten(0, (2, -1)).chunk(ranks, 1)[rank].flatten(0, 1)
    return whole.chunk(ranks, dimension)[rank]


def join(name: str, shares: list[Tensor]) -> Tensor:
    """The inverse of :func:`cut`."""
    dimension = split_dimension(name)
    if dimension is None:
        return shares[0]
    if name.endswith(GATED):
        return torch.cat([share.unflatten(0, (2, -1)) for share in shares], 1).flatten(0, 1)
    return torch.cat(shares, dimension)


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random numbers of one tensor."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.no_grad()
def initialize_layers(module: nn.Module, first_layer: int, layers: int, seed: int, rank: int, ranks: int) -> None:
    """Draw the matrices of a stage's Megatron layers; norms stay one.

    Args:
        module: named as in the whole model, but for the numbers of its layers.
        first_layer, layers: number of the stage's first layer, and of all layers of the model.
        rank, ranks: of the tensor-parallel group.
    """
    for name, parameter in global_names(module, first_layer):
        if parameter.dim() < 2 or parameter.is_meta or "block.layers." not in name:
            continue
        dimension = split_dimension(name)
        shape = [size * (ranks if i == dimension else 1) for i, size in enumerate(parameter.shape)]
        std = STD / math.sqrt(2 * layers) if name.endswith(RESIDUAL) else STD
        whole = torch.empty(shape).normal_(0.0, std, generator=generator_of(seed, name))
        parameter.copy_(cut(name, whole, rank, ranks))


@contextmanager
def drawn_from(seed: int, name: str) -> Iterator[None]:
    """While open, torch's generator draws the numbers of ``name``, whatever was drawn before; afterwards it goes on as if not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(seed, name).initial_seed())
        yield
