"""Initial weights that depend on the seed and their name alone, not on what was drawn before them or where."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

STD = 0.02  # of the backbone's matrices; those that write to the residual stream: divided by sqrt(2 · layers)
RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random numbers of one tensor."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.no_grad()
def initialize_layers(module: nn.Module, layers: int, seed: int) -> None:
    """Draw the matrices of the backbone's ``layers`` Megatron layers; norms stay one. On the meta device: nothing."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 or parameter.is_meta:
            continue
        std = STD / math.sqrt(2 * layers) if name.endswith(RESIDUAL) else STD
        parameter.normal_(0.0, std, generator=generator_of(seed, name))


@contextmanager
def drawn_from(seed: int, name: str) -> Iterator[None]:
    """While open, torch's generator draws the numbers of ``name``, whatever was drawn before; afterwards it goes on as if not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(seed, name).initial_seed())
        yield
