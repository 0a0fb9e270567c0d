"""The diffusion head: denoises the M x K bits of the next block together, given the last block's hidden states.

The architecture follows BitDance (arXiv 2602.14041): a small Transformer with AdaLN modulation and full attention inside the block
(paper, section 3.3), widened by the switches of the recipe.

Legend: N blocks (any leading shape), M tokens a block, K bits, D width of the backbone, W width of the head, H heads.
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

from bitlm_dist.compilation import region
from bitlm_dist.config import Config
from bitlm_dist.diffusion.outputs import BitOutput, MixtureOutput, Output
from bitlm_dist.diffusion.sampler import Denoisers, Step
from bitlm_dist.kernels import in_block_attention
from bitlm_dist.kernels.few_rows import Linear, linear
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.group_tables import GroupTables

TIME_FEATURES = 256


@dataclass(frozen=True)
class Context:
    """What the head needs of the hidden states, computed once for all noise draws and denoising steps."""

    states: Tensor  # [N, M, D]
    condition: Tensor  # [N, M, W]
    logits: Tensor | None  # [N, M, size] of the output law
    readout: tuple[Tensor, Tensor]  # of the head's last features: weight [size, W], bias [size]

    def broadcast(self, draws: int) -> "Context":
        """The same context for several draws: [draws, N, M, ...]."""
        states, condition = (part.expand(draws, *part.shape) for part in (self.states, self.condition))
        logits = None if self.logits is None else self.logits.expand(draws, *self.logits.shape)
        return Context(states, condition, logits, self.readout)


@dataclass(frozen=True)
class Modulation:
    """Time and context y [N, M, W], the six vectors [N, M, 6W] of each run of blocks, and those of the final layer [N, M, 2W]."""

    y: Tensor
    runs: list[Tensor]
    final: Tensor

    def of_layer(self, number: int, layers: int) -> Tensor:
        """The vectors of block ``number`` of ``layers``."""
        return self.runs[number // -(-layers // len(self.runs))]

    def __getitem__(self, index: Any) -> "Modulation":
        """That of some noise levels or tokens."""
        return Modulation(self.y[index], [run[index] for run in self.runs], self.final[index])


@region
def time_features(t: Tensor) -> Tensor:
    """Sinusoids of 1000·t: [...] -> [..., 256]."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = 1000 * t.unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


@region
def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift."""
    normed = F.layer_norm(x, x.shape[-1:])
    return torch.addcmul(normed + shift, normed, scale)


@region
def _added_and_modulated(x: Tensor, gate: Tensor, more: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x + gate·more, and the same modulated."""
    x = torch.addcmul(x, gate, more)
    return x, _modulated(x, shift, scale)


@region
def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def finish(x: Tensor, logits: Tensor | None, readout: tuple[Tensor, Tensor]) -> Tensor:
    """Last features x [..., W], logits and read-out of the context -> raw output [..., size]."""
    out = linear(x, *readout)
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
        more = self.attention_out(attended[..., -x.shape[-2] :, :, :].flatten(-2))
        x, modulated = _added_and_modulated(x, gate1, more, shift2, scale2)
        return torch.addcmul(x, gate2, self.down(_swiglu(self.gate_up(modulated))))


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
        self.tables: GroupTables | None = None
        if isinstance(self.output, MixtureOutput) and has_tables(config, self.output):
            self.tables = GroupTables(self.output, backbone_width)
        self.chained = is_chained(config, bits)
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
        readout = self._make_readout() if self._readout is None else self._readout
        return Context(hidden, self.context_in(hidden), logits, readout)

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

    def forward(self, noisy: Tensor, t: Tensor, context: Context) -> Tensor:
        """noisy [N, M, K], t that broadcasts to [N, M] -> raw output [N, M, size] for ``self.output``."""
        evidence = None
        if self.evidence_in is not None:
            assert context.logits is not None
            evidence = self.output.evidence(context.logits, self.output.field(noisy, t))
        return self._raw(noisy, evidence, context, self.modulate(t, context))

    def _raw(self, noisy: Tensor, evidence: Tensor | None, context: Context, modulation: Modulation) -> Tensor:
        x = self.bits_in(noisy)
        if self.evidence_in is not None:
            x = x + self.evidence_in(evidence)
        return finish(self.features(x, modulation, causal=False), context.logits, context.readout)

    def chain(self, clean: Tensor, context: Context, targets: Tensor | None = None) -> Tensor:
        """Raw output [N, M, size] of every token given the context and what is before it in its block, in one pass.

        Its log-probability of ``clean`` [N, M, K] is the chain rule's. ``targets`` [A, N, M, K] are other tokens after the same
        text; by the tables each has a raw output of its own, [A, N, M, size].

        The tokens themselves are pure noise, so nothing of a token reaches an earlier one, nor its own place but by the tables,
        which give each group of bits the group before it. Where the denoiser needs M passes to go through a block from left to
        right, this is the same law taught in one.
        """
        t = clean.new_ones(1, 1)  # one for all: its features are computed once
        if self.before_in is None:
            x = torch.zeros_like(context.condition)
        else:
            x = F.pad(self.before_in(clean[..., :-1, :]), (0, 0, 1, 0))
        x = self.features(x, self.modulate(t, context), causal=True)
        raw = finish(x, context.logits, context.readout)
        targets = clean if targets is None else targets
        raw = raw.expand(*targets.shape[:-1], -1)
        return raw if self.tables is None else self.tables(raw, self.corrected(x, context.states), targets)

    def corrected(self, x: Tensor, states: Tensor) -> Tensor:
        """What a shared read-out reads: states [..., D] and the correction by the last features x [..., W]."""
        assert self.shared_readout
        return states + self.final(x)

    def modulate(self, t: Tensor, context: Context) -> Modulation:
        """Time t, which broadcasts to [N, M], and context -> what modulates every layer."""
        y = F.silu(self.time_in(time_features(t)) + context.condition)
        return Modulation(y, [layer(y) for layer in self.modulations], self.final_modulation(y))

    def features(
        self,
        x: Tensor,
        modulation: Modulation,
        causal: bool,
        place: slice = slice(None),
        before: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Inputs x [N, M, W] of the blocks' tokens, or of the one at ``place``, -> last features [N, M, W].

        Args:
            modulation: of those tokens.
            causal, before: see :meth:`Block.forward`, ``before`` one list a layer.
        """
        if self.places is not None:
            x = x + modulation.y + self.places[place]
        for number, block in enumerate(self.blocks):
            x = block(x, modulation.of_layer(number, len(self.blocks)), causal, None if before is None else before[number])
        return _modulated(x, *modulation.final.chunk(2, -1))

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

    def denoisers(self, context: Context) -> Denoisers:
        """Times [S, N, M], or what broadcasts to it, -> for each of them noisy [N, M, K] -> A0_hat.

        What does not depend on the noise is computed once, and what does not depend on the bits for all times at once.
        """
        reader = None
        if self.evidence_in is not None:
            assert context.logits is not None
            reader = self.output.reader(context.logits)

        def denoise(t: Tensor, modulation: Modulation, noisy: Tensor) -> Tensor:
            field = self.output.field(noisy, t)
            evidence = None if reader is None else reader(field)
            return self.output.denoise(self._raw(noisy, evidence, context, modulation), field)

        def at(times: Tensor) -> list[Step]:
            modulation = self.modulate(times, context)
            return [partial(denoise, t, modulation[level]) for level, t in enumerate(times)]

        return at


def make_output(config: Config, bits: int) -> Output:
    """The output law that the config names."""
    head, diffusion = config.head, config.diffusion
    if head.output == "mixture":
        return MixtureOutput(bits, head.group, head.components)
    return BitOutput(bits, diffusion.loss, head.squash, head.channel_skip, diffusion.time)


def has_tables(config: Config, output: Output) -> bool:
    """Whether the chain has tables: the config wants them and a token has more than one group."""
    return bool(config.head.group_tables and config.diffusion.chain) and isinstance(output, MixtureOutput) and output.groups > 1


def is_chained(config: Config, bits: int) -> bool:
    """Whether the head has a chain: in a block of one token there is something to go through only with tables."""
    return config.diffusion.chain > 0 and (config.model.block_size > 1 or has_tables(config, make_output(config, bits)))


def head_weights(config: Config, bits: int) -> int:
    """Weights of the head's matrices, roughly the multiply-adds of a token and pass."""
    with torch.device("meta"):
        return sum(p.numel() for p in DiffusionHead(config, bits).parameters() if p.dim() == 2)
