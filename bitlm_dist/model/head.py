"""The diffusion head: denoises the M x K bits of the next block together, given the last block's hidden states.

The architecture follows BitDance (arXiv 2602.14041): a small Transformer with AdaLN modulation and full attention inside the block
(paper, section 3.3), widened by the switches of the recipe.

Legend: N blocks (any leading shape), M tokens a block, K bits, D width of the backbone, W width of the head, H heads.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.config import Config
from bitlm_dist.diffusion.outputs import BitOutput, MixtureOutput, Output, Reader
from bitlm_dist.diffusion.sampler import Denoiser
from bitlm_dist.kernels import in_block_attention
from bitlm_dist.kernels.few_rows import Linear, linear
from bitlm_dist.model.bit_embedding import BitEmbedding

TIME_FEATURES = 256


@dataclass(frozen=True)
class Context:
    """What the head needs of the hidden states, computed once for all noise draws and denoising steps."""

    condition: Tensor  # [N, M, W]
    logits: Tensor | None  # [N, M, size] of the output law
    readout: tuple[Tensor, Tensor]  # of the head's last features: weight [size, W], bias [size]

    def broadcast(self, draws: int) -> "Context":
        """The same context for several draws: [draws, N, M, ...]."""
        logits = None if self.logits is None else self.logits.expand(draws, *self.logits.shape)
        return Context(self.condition.expand(draws, *self.condition.shape), logits, self.readout)


@dataclass(frozen=True)
class Modulation:
    """Time and context y [N, M, W], the six vectors [N, M, 6W] of each run of blocks, and those of the final layer [N, M, 2W]."""

    y: Tensor
    runs: list[Tensor]
    final: Tensor

    def of_layer(self, number: int, layers: int) -> Tensor:
        """The vectors of block ``number`` of ``layers``."""
        return self.runs[number // -(-layers // len(self.runs))]


def exact(like: Tensor) -> torch.autocast:
    """No autocast: noise, posteriors and losses stay fp32 whatever the precision of the layers."""
    return torch.autocast(like.device.type, enabled=False)


def time_features(t: Tensor) -> Tensor:
    """Sinusoids of 1000·t: [...] -> [..., 256]."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = 1000 * t.unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift."""
    normed = F.layer_norm(x, x.shape[-1:])
    return torch.addcmul(normed + shift, normed, scale)


def finish(x: Tensor, modulation: Tensor, logits: Tensor | None, readout: tuple[Tensor, Tensor]) -> Tensor:
    """The last layer: x [N, M, W], its modulation [N, M, 2W], logits and read-out of the context -> raw output [N, M, size]."""
    out = linear(_modulated(x, *modulation.chunk(2, -1)), *readout)
    return out if logits is None else out + logits


class Block(nn.Module):
    """Attention inside the block, then SwiGLU, both with AdaLN shift, scale and gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 3 * width // 2
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.attention_out = Linear(width, width, bias=False)
        self.gate_up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, modulation: Tensor, causal: bool, before: list[Tensor] | None = None) -> Tensor:
        """x [N, M, W], modulation [N, M, 6W] -> [N, M, W].

        Args:
            causal: a token sees itself and those before it.
            before: queries, keys and values [N, 1, 3, H, W/H] of each token before x, which is then one token; its own are
                appended.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        qkv = self.qkv(_modulated(x, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        if before is not None:
            before.append(qkv)
            qkv = torch.cat(before, 1)
        attended = in_block_attention(qkv, qkv.shape[-4], causal)
        x = torch.addcmul(x, gate1, self.attention_out(attended[..., -x.shape[-2] :, :, :].flatten(-2)))
        gate, up = self.gate_up(_modulated(x, shift2, scale2)).chunk(2, -1)
        return torch.addcmul(x, gate2, self.down(F.silu(gate) * up))


def _ahead(block: int, width: int) -> nn.ModuleList:
    """One d x d map a place, from the block's last state; zero at the start."""
    maps = [Linear(width, width, bias=False) for _ in range(block)]
    for layer in maps:
        nn.init.zeros_(layer.weight)
    return nn.ModuleList(maps)


class DiffusionHead(nn.Module):
    """(noisy bits, t, context) -> raw output of the output law.

    Usage: ``context = head.read(C)`` once, then ``head(noisy, t, context)`` for every noise level, and ``head.output`` reads it.
    Modulation and final layers start at zero, so an untrained head returns the context logits alone.
    """

    def __init__(self, config: Config, bits: int) -> None:
        super().__init__()
        head, block, width = config.head, config.model.block_size, config.head.width
        backbone_width = config.model.backbone.width
        self.output = make_output(config, bits)
        self.bits_in = Linear(bits, width)
        self.context_in = Linear(backbone_width, width)
        self.time_in = nn.Sequential(Linear(TIME_FEATURES, width), nn.SiLU(), Linear(width, width))
        self.null = nn.Parameter(torch.zeros(backbone_width))
        self.positions = nn.Parameter(torch.zeros(block, backbone_width)) if head.position_table else None
        self.ahead = _ahead(block, backbone_width) if head.context_ahead and block > 1 else None
        self.places = nn.Parameter(torch.randn(block, width) * 0.1) if head.input_condition else None
        self.context_out = Linear(backbone_width, self.output.size) if head.context_logits else None
        self.evidence_in = Linear(self.output.evidence_size, width, bias=False) if head.posterior_input else None
        window = config.model.input_window
        self.before_in = BitEmbedding(bits, width, window) if config.diffusion.chain and block > 1 else None
        self.blocks = nn.ModuleList(Block(width, head.heads) for _ in range(head.layers))
        self.modulations = nn.ModuleList(Linear(width, 6 * width) for _ in range(head.modulations))
        self.final_modulation = Linear(width, 2 * width)
        # What the backbone learns of the output law at every step, the head need not learn again.
        self.final = Linear(width, backbone_width if head.shared_readout else self.output.size)
        self.shared_readout = head.shared_readout
        self._readout: tuple[Tensor, Tensor] | None = None  # while decoding
        for layer in (*self.modulations, self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def read(self, hidden: Tensor, keep: Tensor | None = None) -> Context:
        """Hidden states C [N, M, D] of the block before -> context; where ``keep`` [N] is False the learned null state."""
        if keep is not None:
            hidden = torch.where(keep[..., None, None], hidden, self.null)
        if self.ahead is not None:
            last = hidden[..., -1, :]
            hidden = hidden + torch.stack([look(last) for look in self.ahead], -2)
        if self.positions is not None:
            hidden = hidden + self.positions
        logits = None if self.context_out is None else self.context_out(hidden)
        return Context(self.context_in(hidden), logits, self._make_readout() if self._readout is None else self._readout)

    def next_logits(self, states: Tensor) -> Tensor:
        """States C [..., D] -> context logits [..., size] of the one token after each: place 0 of a block that begins there."""
        assert self.context_out is not None
        if self.ahead is not None:
            states = states + self.ahead[0](states)
        if self.positions is not None:
            states = states + self.positions[0]
        logits: Tensor = self.context_out(states)
        return logits

    def unconditional(self, context: Context) -> Context:
        """The context of the null state, for guidance, in the shape of ``context``."""
        null = self.null.expand(*context.condition.shape[:-1], -1)
        return self.read(null)

    def forward(self, noisy: Tensor, t: Tensor, context: Context, reader: Reader | None = None) -> Tensor:
        """noisy [N, M, K], t that broadcasts to [N, M] -> raw output [N, M, size] for ``self.output``.

        Args:
            reader: that of the context's logits, where it is used more than once.
        """
        x = self.bits_in(noisy)
        if self.evidence_in is not None:
            assert context.logits is not None
            with exact(noisy):
                evidence = self.output.evidence(context.logits, noisy, t) if reader is None else reader(noisy, t)
            x = x + self.evidence_in(evidence)
        return self._transform(x, t, context, causal=False)

    def chain(self, clean: Tensor, context: Context) -> Tensor:
        """Raw output [N, M, size] of every token given the context and the clean tokens before it in its block, in one pass.

        The tokens themselves are pure noise, so nothing of ``clean`` [N, M, K] reaches its own place or an earlier one: where the
        denoiser needs M passes to go through a block from left to right, this is the same law taught in one.
        """
        assert self.before_in is not None
        before = self.before_in(clean[..., :-1, :])
        t = clean.new_ones(1, 1)  # one for all: its features are computed once
        return self._transform(F.pad(before, (0, 0, 1, 0)), t, context, causal=True)

    def left_to_right(self, context: Context) -> Callable[[int, Tensor], Tensor]:
        """(i, bits [N, M, K]) -> raw output [N, size] of token i, the tokens before it clean, it and those after it pure noise."""

        def raw(i: int, bits: Tensor) -> Tensor:
            t = (torch.arange(bits.shape[-2], device=bits.device) >= i).float().expand(bits.shape[:-1])
            return self(bits, t, context)[:, i]

        return raw

    def modulate(self, t: Tensor, context: Context) -> Modulation:
        """Time t, which broadcasts to [N, M], and context -> what modulates every layer."""
        y = F.silu(self.time_in(time_features(t)) + context.condition)
        return Modulation(y, [layer(y) for layer in self.modulations], self.final_modulation(y))

    def _transform(self, x: Tensor, t: Tensor, context: Context, causal: bool) -> Tensor:
        """Input x [N, M, W] at time t -> raw output [N, M, size]."""
        modulation = self.modulate(t, context)
        if self.places is not None:
            x = x + modulation.y + self.places
        for number, block in enumerate(self.blocks):
            x = block(x, modulation.of_layer(number, len(self.blocks)), causal)
        return finish(x, modulation.final, context.logits, context.readout)

    def _make_readout(self) -> tuple[Tensor, Tensor]:
        """The map from the last features to the output law.

        A shared read-out, context_out(state + final(x)), is linear: the state's logits are there already, the product of the two
        matrices is small, and no token takes the detour over D.
        """
        if not self.shared_readout:
            return self.final.weight, self.final.bias
        assert self.context_out is not None
        return self.context_out.weight @ self.final.weight, F.linear(self.final.bias, self.context_out.weight)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While open, no weight may change: what depends on weights alone is computed once."""
        self._readout = self._make_readout()
        try:
            yield
        finally:
            self._readout = None

    def denoise(self, noisy: Tensor, t: Tensor, context: Context, reader: Reader | None = None) -> Tensor:
        """A0_hat [N, M, K]; arguments as in :meth:`forward`."""
        raw = self(noisy, t, context, reader)
        with exact(noisy):
            return self.output.denoise(raw, noisy, t)

    def denoiser(self, context: Context) -> Denoiser:
        """(noisy, t) -> A0_hat, for the many steps of a sampler."""
        reader = None
        if self.evidence_in is not None:
            assert context.logits is not None
            reader = self.output.reader(context.logits)
        return lambda noisy, t: self.denoise(noisy, t, context, reader)


class ChainDecoder:
    """:meth:`DiffusionHead.chain` token by token: (i, bits [N, M, K]) -> raw output [N, size], for i = 0, 1, … in turn.

    The modulation is computed once for the block, and every pass handles one token: keys and values of those before it are kept.
    """

    def __init__(self, head: DiffusionHead, context: Context) -> None:
        self._head, self._context = head, context
        self._modulation = head.modulate(context.condition.new_ones(1, 1), context)
        self._before: list[list[Tensor]] = [[] for _ in head.blocks]
        self._done = 0

    def __call__(self, i: int, bits: Tensor) -> Tensor:
        """Handle the tokens up to i, of which those before it are clean in ``bits``."""
        while self._done <= i:
            raw = self._step(self._done, bits)
            self._done += 1
        return raw

    def _step(self, i: int, bits: Tensor) -> Tensor:
        head, modulation, here = self._head, self._modulation, slice(i, i + 1)
        assert head.before_in is not None
        x = head.before_in(bits[:, i - 1 : i]) if i else torch.zeros_like(modulation.y[:, :1])
        if head.places is not None:
            x = x + modulation.y[:, here] + head.places[here]
        for number, (block, before) in enumerate(zip(head.blocks, self._before, strict=True)):
            x = block(x, modulation.of_layer(number, len(head.blocks))[:, here], True, before)
        logits = None if self._context.logits is None else self._context.logits[:, here]
        return finish(x, modulation.final[:, here], logits, self._context.readout)[:, 0]


def make_output(config: Config, bits: int) -> Output:
    """The output law that the config names."""
    head, diffusion = config.head, config.diffusion
    if head.output == "mixture":
        return MixtureOutput(bits, head.group, head.components)
    return BitOutput(bits, diffusion.loss, head.squash, head.channel_skip, diffusion.time)
