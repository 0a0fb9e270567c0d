"""Build the head that a config names."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.model.heads.base import Head
from bitlm_dist.model.heads.bitlm import BitLMHead
from bitlm_dist.model.heads.blocks import AdaLNHead
from bitlm_dist.model.heads.config import AblationHeadConfig
from bitlm_dist.model.heads.paper import PaperHead

# The heads of the study are not installed with the package: they lie beside it in a checkout.
ABLATIONS = Path(__file__).parents[3] / "experiments" / "ablation" / "heads.py"


def build_head(config: Config, num_bits: int) -> Head[Any]:
    """Build the head that ``head.kind`` names.

    Raises:
        UserError: There is no such head, or it has not all losses whose weights are set.
    """
    head = head_class(config)(config, num_bits)

    # With blocks of one token, no head has all of the other terms.
    may_miss = ("autoregressive", "next_token") if config.model.block_size == 1 else ()
    weighted = config.diffusion.loss_weights(("context", "autoregressive", "next_token"))
    missing = [term for term in weighted if term not in (*head.loss_terms, *may_miss)]
    if missing and isinstance(config.head, AblationHeadConfig):
        raise UserError(
            f"diffusion.{missing[0]}_loss_weight = {weighted[missing[0]]}: "
            f"head.ablation = {config.head.ablation} has no such loss: use 0"
        )
    return head


def head_class(config: Config) -> type[AdaLNHead[Any]]:
    """The class of the head that ``head.kind`` names.

    Raises:
        UserError: There is no such head.
    """
    if config.head.kind == "paper":
        return PaperHead
    if isinstance(config.head, AblationHeadConfig):
        return _ablation(config.head.ablation)
    return BitLMHead


def _ablation(name: str) -> type[AdaLNHead[Any]]:
    if not ABLATIONS.is_file():
        raise UserError(
            f"head.ablation = {name}: the heads of the study are in a checkout of the repository, "
            "in experiments/ablation, and not in the installed package: run from there"
        )

    heads: dict[str, type[AdaLNHead[Any]]] = _load(ABLATIONS).HEADS
    if name not in heads:
        problem = f"head.ablation = {name} does not exist" if name else "head.ablation is not set"
        raise UserError(f"{problem}; there are {', '.join(heads)}")
    return heads[name]


@cache
def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bitlm_ablation_heads", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look it up
    spec.loader.exec_module(module)
    return module


def meta_head(config: Config, num_bits: int) -> Head[Any]:
    """Build the head on the meta device, which allocates no memory."""
    with torch.device("meta"):
        return build_head(config, num_bits)


def num_head_weights(config: Config, num_bits: int) -> int:
    """Count the matrix weights of the head: roughly its multiply-adds per token and pass.

    Stacks of matrices do not count: of the lookahead's and of the group tables', a token meets few.
    """
    return sum(p.numel() for p in meta_head(config, num_bits).parameters() if p.dim() == 2)
