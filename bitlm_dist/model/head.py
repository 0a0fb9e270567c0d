"""The diffusion head: jointly denoises the M x K bits of a block, given states of the block before.

The architecture follows BitDance (arXiv 2602.14041): a small Transformer with AdaLN modulation and
full attention within the block (BitLM paper, section 3.3), plus the options of docs/recipe.md.

Legend: N blocks (any leading shape), M tokens per block, K bits, D hidden size of the backbone,
W hidden size of the head, H attention heads, S noise levels, A alternative tokens per position.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.compilation import compiled_region
from bitlm_dist.config import Config
from bitlm_dist.diffusion.outputs import BitOutput, MixtureOutput, OutputDistribution
from bitlm_dist.diffusion.sampler import Denoisers, DenoiseStep
from bitlm_dist.kernels import in_block_attention
from bitlm_dist.kernels.skinny_linear import Linear, linear
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.conditional_group_logits import ConditionalGroupLogits
from bitlm_dist.model.config import HeadConfig

TIMESTEP_EMBEDDING_DIM = 256


@dataclass(frozen=True)
class Conditioning:
    """Conditioning derived from the hidden states.

    It is computed once and reused for every noise sample and denoising step.
    """

    hidden_states: Tensor  # [N, M, D]
    projected: Tensor  # [N, M, W]
    context_logits: Tensor | None  # [N, M, num_logits] for the output distribution
    # weight [num_logits, W] and bias [num_logits] of the linear map from last features to output
    readout: tuple[Tensor, Tensor]

    def expand(self, num_noise_samples: int) -> "Conditioning":
        """Repeat for several noise samples: [num_noise_samples, N, M, ...]."""
        hidden_states, projected = (
            part.expand(num_noise_samples, *part.shape)
            for part in (self.hidden_states, self.projected)
        )
        context_logits = (
            None
            if self.context_logits is None
            else self.context_logits.expand(num_noise_samples, *self.context_logits.shape)
        )
        return Conditioning(hidden_states, projected, context_logits, self.readout)


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


def apply_readout(
    x: Tensor, context_logits: Tensor | None, readout: tuple[Tensor, Tensor]
) -> Tensor:
    """Map the last features x [..., W] to the raw output [..., num_logits].

    Args:
        context_logits: [..., num_logits], added to the output; None: nothing is added.
        readout: weight and bias, see :class:`Conditioning`.
    """
    out = linear(x, *readout)
    return out if context_logits is None else out + context_logits


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


def _make_lookahead(block_size: int, hidden_size: int) -> nn.ModuleList:
    """Build a zero-initialized D x D projection of the block's last state for each position."""
    maps = [Linear(hidden_size, hidden_size, bias=False) for _ in range(block_size)]
    for layer in maps:
        nn.init.zeros_(layer.weight)
    return nn.ModuleList(maps)


class DiffusionHead(nn.Module):
    """Maps noisy bits, their times and the conditioning to logits of the output distribution.

    Call ``conditioning = head.condition(hidden)`` once, then ``head(noisy, t, conditioning)`` for
    every noise level; ``head.output`` interprets the result, called raw output. Modulation and
    final layers start at zero, so an untrained head returns the context logits alone.
    """

    def __init__(self, config: Config, num_bits: int) -> None:
        super().__init__()
        self.output = make_output_distribution(config, num_bits)

        # The order of these calls determines the random initialization and must not change.
        self._build_inputs(config, num_bits)
        self._build_layers(config.head)
        self._build_readout(config)

        self.has_autoregressive_pass = has_autoregressive_pass(config, num_bits)
        self._readout: tuple[Tensor, Tensor] | None = None  # set while decoding

        # at initialization, all gates are closed and the context logits are not corrected
        for layer in (*self.modulations, self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _build_inputs(self, config: Config, num_bits: int) -> None:
        """Build the projections of bits, time and hidden states, and the optional inputs."""
        head = config.head
        block_size = config.model.block_size
        width = head.hidden_size
        backbone_hidden_size = config.model.backbone.hidden_size

        self.bits_in = Linear(num_bits, width)
        self.context_in = Linear(backbone_hidden_size, width)
        self.time_in = nn.Sequential(
            Linear(TIMESTEP_EMBEDDING_DIM, width), nn.SiLU(), Linear(width, width)
        )
        self.null_embedding = nn.Parameter(torch.zeros(backbone_hidden_size))

        # Each of these is None if the config disables it.
        self.positions = (
            nn.Parameter(torch.zeros(block_size, backbone_hidden_size))
            if head.position_table
            else None
        )
        self.lookahead = (
            _make_lookahead(block_size, backbone_hidden_size)
            if head.context_ahead and block_size > 1
            else None
        )
        self.position_bias = (
            nn.Parameter(torch.randn(block_size, width) * 0.1) if head.input_condition else None
        )
        self.context_out = (
            Linear(backbone_hidden_size, self.output.num_logits) if head.context_logits else None
        )
        self.posterior_in = (
            Linear(self.output.num_posterior_features, width, bias=False)
            if head.posterior_input
            else None
        )
        self.previous_token_in = (
            BitEmbedding(num_bits, width, config.model.input_window)
            if config.diffusion.autoregressive_loss_weight and block_size > 1
            else None
        )

    def _build_layers(self, head: HeadConfig) -> None:
        """Build the Transformer layers and their modulation."""
        width = head.hidden_size
        self.blocks = nn.ModuleList(
            AdaLNBlock(width, head.num_heads) for _ in range(head.num_layers)
        )
        self.modulations = nn.ModuleList(
            Linear(width, 6 * width) for _ in range(head.num_adaln_layers)
        )
        self.final_modulation = Linear(width, 2 * width)

    def _build_readout(self, config: Config) -> None:
        """Build the map from the last features to the raw output."""
        head = config.head
        backbone_hidden_size = config.model.backbone.hidden_size

        # With a shared readout, the head does not have to learn a second time what the backbone's
        # context logits learn about the output distribution.
        self.final = Linear(
            head.hidden_size,
            backbone_hidden_size if head.shared_readout else self.output.num_logits,
        )
        self.shared_readout = head.shared_readout

        self.conditional_group_logits: ConditionalGroupLogits | None = None
        if isinstance(self.output, MixtureOutput) and has_conditional_groups(config, self.output):
            self.conditional_group_logits = ConditionalGroupLogits(
                self.output, backbone_hidden_size
            )

    def condition(self, hidden: Tensor, keep_mask: Tensor | None = None) -> Conditioning:
        """Compute the conditioning from the hidden states of the previous block.

        Args:
            hidden: [N, M, D], C in the paper.
            keep_mask: [N]; blocks where it is False get the learned null embedding instead.
        """
        if keep_mask is not None:
            hidden = torch.where(keep_mask[..., None, None], hidden, self.null_embedding)

        # With causal attention, only the last state has seen the full block.
        if self.lookahead is not None:
            last = hidden[..., -1, :]
            hidden = hidden + torch.stack([projection(last) for projection in self.lookahead], -2)
        if self.positions is not None:
            hidden = hidden + self.positions

        context_logits = None if self.context_out is None else self.context_out(hidden)
        readout = self._make_readout() if self._readout is None else self._readout
        return Conditioning(hidden, self.context_in(hidden), context_logits, readout)

    def next_token_logits(self, hidden_states: Tensor) -> Tensor:
        """Context logits of the token after each state.

        That token is position 0 of a hypothetical block which begins there.

        Args:
            hidden_states: [..., D].

        Returns:
            [..., num_logits].
        """
        assert self.context_out is not None
        if self.lookahead is not None:
            hidden_states = hidden_states + self.lookahead[0](hidden_states)
        if self.positions is not None:
            hidden_states = hidden_states + self.positions[0]
        logits: Tensor = self.context_out(hidden_states)
        return logits

    def unconditional(self, conditioning: Conditioning) -> Conditioning:
        """Conditioning of the null embedding, shaped like ``conditioning``, for guidance."""
        null = self.null_embedding.expand(*conditioning.projected.shape[:-1], -1)
        return self.condition(null)

    def forward(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Compute the raw output, which ``self.output`` interprets.

        Args:
            noisy: bits [N, M, K].
            t: times that broadcast to [N, M].

        Returns:
            [N, M, num_logits].
        """
        posterior_features = None
        if self.posterior_in is not None:
            assert conditioning.context_logits is not None
            posterior_features = self.output.posterior_features(
                conditioning.context_logits, self.output.channel_logits(noisy, t)
            )
        return self._logits(noisy, posterior_features, conditioning, self.modulate(t, conditioning))

    def _logits(
        self,
        noisy: Tensor,
        posterior_features: Tensor | None,
        conditioning: Conditioning,
        modulation: Modulation,
    ) -> Tensor:
        x = self.bits_in(noisy)
        if self.posterior_in is not None:
            x = x + self.posterior_in(posterior_features)

        return apply_readout(
            self.features(x, modulation, causal=False),
            conditioning.context_logits,
            conditioning.readout,
        )

    def autoregressive_logits(
        self, clean: Tensor, conditioning: Conditioning, targets: Tensor | None = None
    ) -> Tensor:
        """Raw output of each token given the context and the tokens before it in its block.

        The inputs hold no noisy bits and attention is causal, so no position sees its own token or
        a later one. Within a token, only the group tables condition a group of bits on the previous
        one. This models the same distribution as M left-to-right denoiser passes, in a single pass:
        the log-probability of ``clean`` under the output is that of the chain rule.

        Args:
            clean: bits [N, M, K].
            targets: bits [A, N, M, K] of alternative tokens at the same positions. The group tables
                give each of them its own raw output. None: ``clean``.

        Returns:
            [N, M, num_logits], or [A, N, M, num_logits] for ``targets``.
        """
        t = clean.new_ones(1, 1)  # pure noise at all tokens, so its embedding is computed once

        # Each token reads the token before it; the first one has none.
        if self.previous_token_in is None:
            x = torch.zeros_like(conditioning.projected)
        else:
            x = F.pad(self.previous_token_in(clean[..., :-1, :]), (0, 0, 1, 0))
        x = self.features(x, self.modulate(t, conditioning), causal=True)
        logits = apply_readout(x, conditioning.context_logits, conditioning.readout)

        # Without group tables, the output does not depend on the token itself.
        targets = clean if targets is None else targets
        logits = logits.expand(*targets.shape[:-1], -1)
        return (
            logits
            if self.conditional_group_logits is None
            else self.conditional_group_logits(
                logits, self.readout_input(x, conditioning.hidden_states), targets
            )
        )

    def readout_input(self, x: Tensor, hidden_states: Tensor) -> Tensor:
        """Input of a shared readout: states [..., D] corrected by the last features x [..., W]."""
        assert self.shared_readout
        return hidden_states + self.final(x)

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
        causal: bool,
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
        # The conditioning is an input too, in addition to modulating the layers.
        if self.position_bias is not None:
            x = x + modulation.adaln_input + self.position_bias[positions]

        for layer_index, block in enumerate(self.blocks):
            x = block(
                x,
                modulation.for_layer(layer_index, len(self.blocks)),
                causal,
                None if qkv_caches is None else qkv_caches[layer_index],
            )

        return _norm_and_modulate(x, *modulation.final_modulation.chunk(2, -1))

    def _make_readout(self) -> tuple[Tensor, Tensor]:
        """Weight and bias that map the last features to the raw output.

        A shared readout is context_out(state + final(x)), which is linear. context_out(state) are
        the context logits, which are added anyway. What is left is one small matrix, the product of
        context_out and final, so no token needs an intermediate vector of size D.
        """
        if not self.shared_readout:
            return self.final.weight, self.final.bias

        assert self.context_out is not None
        weight = self.context_out.weight @ self.final.weight
        return weight, F.linear(self.final.bias, self.context_out.weight)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Context that caches what depends on the weights alone; they must not change in it."""
        self._readout = self._make_readout()

        try:
            yield
        finally:
            self._readout = None

    def denoisers(self, conditioning: Conditioning) -> Denoisers:
        """Build the denoisers that a sampler calls.

        Work that is independent of the noise is done once, and work that is independent of the bits
        is done for all times at once.

        Returns:
            A function from times [S, N, M], or times that broadcast to it, to S functions, each of
            which maps noisy bits [N, M, K] to A0_hat, the estimate of the clean bits.
        """
        posterior_fn = None
        if self.posterior_in is not None:
            assert conditioning.context_logits is not None
            posterior_fn = self.output.posterior_fn(conditioning.context_logits)

        def denoise(t: Tensor, modulation: Modulation, noisy: Tensor) -> Tensor:
            """Estimate the clean bits at one noise level."""
            channel_logits = self.output.channel_logits(noisy, t)
            posterior_features = None if posterior_fn is None else posterior_fn(channel_logits)
            return self.output.denoise(
                self._logits(noisy, posterior_features, conditioning, modulation), channel_logits
            )

        def denoise_steps(times: Tensor) -> list[DenoiseStep]:
            """Bind :func:`denoise` to each of the times."""
            modulation = self.modulate(times, conditioning)
            return [
                partial(denoise, t, modulation[step_index]) for step_index, t in enumerate(times)
            ]

        return denoise_steps


def make_output_distribution(config: Config, num_bits: int) -> OutputDistribution:
    """Build the output distribution that the config selects."""
    head = config.head
    diffusion = config.diffusion
    if head.output == "mixture":
        return MixtureOutput(num_bits, head.bits_per_group, head.num_mixture_components)

    return BitOutput(
        num_bits, diffusion.loss, head.squash, head.channel_skip, diffusion.time_distribution
    )


def has_conditional_groups(config: Config, output: OutputDistribution) -> bool:
    """True if the autoregressive pass has group tables.

    The config must enable them, and a token must have more than one group.
    """
    return (
        bool(config.head.group_tables and config.diffusion.autoregressive_loss_weight)
        and isinstance(output, MixtureOutput)
        and output.num_groups > 1
    )


def has_autoregressive_pass(config: Config, num_bits: int) -> bool:
    """True if the head has an autoregressive pass.

    In a block of one token, only the group tables have anything to condition on.
    """
    return config.diffusion.autoregressive_loss_weight > 0 and (
        config.model.block_size > 1
        or has_conditional_groups(config, make_output_distribution(config, num_bits))
    )


def num_head_weights(config: Config, num_bits: int) -> int:
    """Count the matrix weights of the head: roughly its multiply-adds per token and pass."""
    # the meta device counts without allocating the weights
    with torch.device("meta"):
        return sum(p.numel() for p in DiffusionHead(config, num_bits).parameters() if p.dim() == 2)
