"""The Transformer of a diffusion head: AdaLN modulation, and full attention within the block.

It follows BitDance (arXiv 2602.14041; BitLM paper, section 3.3).

Legend: N blocks (any leading shape), M tokens per block, K bits, D hidden size of the backbone,
W hidden size of the head, H attention heads, S noise levels.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.compilation import compiled_region
from bitlm_dist.config import Config
from bitlm_dist.diffusion.sampler import Denoisers, DenoiseStep
from bitlm_dist.kernels import in_block_attention
from bitlm_dist.model.heads.base import C, Conditioning, Head
from bitlm_dist.model.initialization import Linear, zero_linear

TIMESTEP_EMBEDDING_DIM = 256


@compiled_region
def timestep_embedding(t: Tensor) -> Tensor:
    """Embed times [...] as sinusoids of 1000·t, [..., 256]."""
    half = TIMESTEP_EMBEDDING_DIM // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = 1000 * t.unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


@compiled_region
def _norm_and_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute norm(x)·(1 + scale) + shift."""
    normed = F.layer_norm(x, x.shape[-1:])
    return torch.addcmul(normed + shift, normed, scale)


@compiled_region
def _add_and_modulate(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute x + gate·branch, and the modulated norm of that sum."""
    x = torch.addcmul(x, gate, branch)
    return x, _norm_and_modulate(x, shift, scale)


@compiled_region
def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class Modulation:
    """AdaLN modulation of all layers of the head.

    Attributes:
        adaln_input: embedding of time and hidden states, [N, M, W].
        layer_modulations: shift, scale and gate vectors [N, M, 6W], one tensor per group of
            consecutive layers that share them.
        final_modulation: shift and scale of the final layer, [N, M, 2W].
    """

    adaln_input: Tensor
    layer_modulations: list[Tensor]
    final_modulation: Tensor

    def for_layer(self, layer_index: int, num_layers: int) -> Tensor:
        """Return the vectors of layer ``layer_index`` of ``num_layers``."""
        return self.layer_modulations[layer_index // -(-num_layers // len(self.layer_modulations))]

    def __getitem__(self, index: Any) -> "Modulation":
        """Select noise levels or tokens."""
        return Modulation(
            self.adaln_input[index],
            [run[index] for run in self.layer_modulations],
            self.final_modulation[index],
        )


class AdaLNBlock(nn.Module):
    """Transformer layer: attention within a block of tokens, then SwiGLU, both with AdaLN."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        ffn_hidden_size = 3 * hidden_size // 2
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attention_out = Linear(hidden_size, hidden_size, bias=False)
        self.gate_up = Linear(hidden_size, 2 * ffn_hidden_size, bias=False)
        self.down = Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(
        self, x: Tensor, modulation: Tensor, causal: bool, qkv_cache: list[Tensor] | None = None
    ) -> Tensor:
        """Transform the tokens of each block.

        Args:
            x: [N, M, W].
            modulation: [N, M, 6W].
            causal: each token attends to itself and the tokens before it; False: to all.
            qkv_cache: one [N, 1, 3, H, W/H] per earlier token of the block; that of x, which must
                be a single token, is appended. None: x holds the full blocks.

        Returns:
            [N, M, W].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)

        qkv = self.qkv(_norm_and_modulate(x, shift1, scale1)).unflatten(-1, (3, self.num_heads, -1))
        if qkv_cache is not None:
            qkv_cache.append(qkv)
            qkv = torch.cat(qkv_cache, 1)
        attended = in_block_attention(qkv, qkv.shape[-4], causal)

        # With a cache, only the last token is new.
        branch = self.attention_out(attended[..., -x.shape[-2] :, :, :].flatten(-2))

        x, modulated = _add_and_modulate(x, gate1, branch, shift2, scale2)
        return torch.addcmul(x, gate2, self.down(_swiglu(self.gate_up(modulated))))


class AdaLNHead(Head[C]):
    """What all heads share: inputs, modulation and layers. Heads derive from it.

    Modulation starts at zero, so all gates are closed in an untrained head.

    Args:
        config: a validated config.
        num_bits: K.
    """

    def __init__(self, config: Config, num_bits: int) -> None:
        super().__init__()
        head = config.head
        width = head.hidden_size

        self.build_inputs(config, num_bits)
        self.blocks = nn.ModuleList(
            AdaLNBlock(width, head.num_heads) for _ in range(head.num_layers)
        )
        self.modulations = nn.ModuleList(
            zero_linear(Linear(width, 6 * width)) for _ in range(head.num_adaln_layers)
        )
        self.final_modulation = zero_linear(Linear(width, 2 * width))

    def build_inputs(self, config: Config, num_bits: int) -> None:
        """Build the maps of bits, time and hidden states; a head adds inputs of its own."""
        width = config.head.hidden_size
        backbone_hidden_size = config.model.backbone.hidden_size
        self.bits_in = Linear(num_bits, width)
        self.context_in = Linear(backbone_hidden_size, width)
        self.time_in = nn.Sequential(
            Linear(TIMESTEP_EMBEDDING_DIM, width), nn.SiLU(), Linear(width, width)
        )
        self.null_embedding = nn.Parameter(torch.zeros(backbone_hidden_size))

    def keep_or_null(self, hidden: Tensor, keep_mask: Tensor | None) -> Tensor:
        """Replace the states [N, M, D] of blocks to be dropped by the null embedding."""
        if keep_mask is None:
            return hidden
        return torch.where(keep_mask[..., None, None], hidden, self.null_embedding)

    @override
    def unconditional(self, conditioning: C) -> C:
        null = self.null_embedding.expand(*conditioning.projected.shape[:-1], -1)
        return self.condition(null)

    def modulate(self, t: Tensor, conditioning: Conditioning) -> Modulation:
        """Compute the modulation of every layer at times t, which broadcast to [N, M]."""
        adaln_input = F.silu(self.time_in(timestep_embedding(t)) + conditioning.projected)
        return Modulation(
            adaln_input,
            [layer(adaln_input) for layer in self.modulations],
            self.final_modulation(adaln_input),
        )

    def features(
        self,
        x: Tensor,
        modulation: Modulation,
        causal: bool = False,
        positions: slice = slice(None),
        qkv_caches: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Run the Transformer layers and the final norm.

        Args:
            x: inputs [N, M, W] of all tokens of the blocks, or of the token at ``positions``.
            modulation: modulation of those tokens.
            positions: positions of those tokens within the block.
            causal, qkv_caches: see :meth:`AdaLNBlock.forward`; one cache per layer.

        Returns:
            Last features [N, M, W].
        """
        for layer_index, block in enumerate(self.blocks):
            x = block(
                x,
                modulation.for_layer(layer_index, len(self.blocks)),
                causal,
                None if qkv_caches is None else qkv_caches[layer_index],
            )

        return _norm_and_modulate(x, *modulation.final_modulation.chunk(2, -1))

    @abstractmethod
    def estimator(self, conditioning: C) -> Callable[[Tensor, Modulation, Tensor], Tensor]:
        """Build a function from t, its modulation and noisy bits [N, M, K] to A0_hat."""

    @override
    def denoisers(self, conditioning: C) -> Denoisers:
        estimate = self.estimator(conditioning)

        def denoise_steps(times: Tensor) -> list[DenoiseStep]:
            """Bind the estimator to each of the times."""
            modulation = self.modulate(times, conditioning)
            return [
                partial(estimate, t, modulation[step_index]) for step_index, t in enumerate(times)
            ]

        return denoise_steps
