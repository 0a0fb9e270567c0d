"""The same training step as anyone would write it in plain PyTorch: no Megatron, no counter-based noise, no data pipeline.

What the stack costs is measured against it. The diffusion head is the same module, which is plain PyTorch already; the backbone's
layer is the one that decoding runs.

Legend: B batch, S sequence, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import BackboneConfig, Config
from bitlm_dist.diffusion.process import logit_normal
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.head import DiffusionHead
from bitlm_dist.model.plain_layer import LayerWeights, layer, rotary


class PlainLayer(nn.Module):
    """The weights of :func:`bitlm_dist.model.plain_layer.layer`."""

    def __init__(self, b: BackboneConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(b.width)), nn.Parameter(torch.ones(b.width))
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(b.head_width)), nn.Parameter(torch.ones(b.head_width))
        self.qkv = nn.Linear(b.width, (b.heads + 2 * b.kv_heads) * b.head_width, bias=False)
        self.out = nn.Linear(b.heads * b.head_width, b.width, bias=False)
        self.gate_up = nn.Linear(b.width, 2 * b.ffn_width, bias=False)
        self.down = nn.Linear(b.ffn_width, b.width, bias=False)
        self.per_group = b.heads // b.kv_heads

    def weights(self) -> LayerWeights:
        """In the order that the function takes."""
        qk_norm = torch.cat((self.q_norm.expand(self.per_group, -1), self.k_norm[None]))
        out, gate_up, down = self.out.weight, self.gate_up.weight, self.down.weight
        return LayerWeights(self.norm1, self.qkv.weight, qk_norm, out, self.norm2, gate_up, down)


class PlainBackbone(nn.Module):
    """Block-causal Transformer."""

    def __init__(self, b: BackboneConfig, block: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer(b) for _ in range(b.layers))
        self.norm = nn.RMSNorm(b.width, 1e-6)
        self.block, self.config = block, b

    def forward(self, x: Tensor, document_ids: Tensor) -> Tensor:
        """x [B, S, D], document_ids [B, S] -> [B, S, D]."""
        b, place = self.config, torch.arange(x.shape[1], device=x.device)
        mask = place[None, :] // self.block <= place[:, None] // self.block
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=b.heads != b.kv_heads)

        cos, sin = rotary(0, x.shape[1], b.rope_base, b.head_width, x)
        for plain in self.layers:
            assert isinstance(plain, PlainLayer)
            x = layer(x, plain.weights(), cos, sin, attend, b.kv_heads)
        return self.norm(x)


class PlainBitLM(nn.Module):
    """The model and its loss on whole blocks of one document a sequence."""

    def __init__(self, config: Config, codes: BitCodes) -> None:
        super().__init__()
        self.config, self.codes = config, codes
        self.embedding = BitEmbedding(codes.bits, config.model.backbone.width, config.model.input_window)
        self.backbone = PlainBackbone(config.model.backbone, config.model.block_size if config.model.attention == "block" else 1)
        self.head = DiffusionHead(config, codes.bits)

    def loss(self, tokens: Tensor, document_ids: Tensor) -> Tensor:
        """tokens [B, S] -> mean loss of the tokens after the first block."""
        m, diffusion = self.config.model.block_size, self.config.diffusion
        bits = self.codes.encode(tokens)
        states = self.backbone(self.embedding(bits), document_ids)
        clean = bits.unflatten(1, (-1, m))[:, 1:].flatten(0, 1)
        context = self.head.read(states.unflatten(1, (-1, m))[:, :-1].flatten(0, 1))
        clean = clean.expand(diffusion.draws, *clean.shape)
        shared, own = torch.randn(clean.shape[:2], device=clean.device), torch.randn(clean.shape[:3], device=clean.device)
        each = torch.rand(clean.shape[:2], device=clean.device) < diffusion.per_token
        t = torch.where(each[..., None], logit_normal(own, diffusion.per_token_sigma), logit_normal(shared)[..., None])
        noisy = (1 - t)[..., None] * clean + t[..., None] * torch.randn_like(clean)
        loss = self.head.output.loss(self.head(noisy, t, context.broadcast(diffusion.draws)), noisy, t, clean).mean()
        if context.logits is not None:
            loss = loss - self.head.output.log_prob(context.logits, clean[0]).mean() / self.codes.bits
        if self.head.chained:
            chain = self.head.output.log_prob(self.head.chain(clean[0], context), clean[0])
            loss = loss - diffusion.chain * chain.mean() / self.codes.bits
        if diffusion.next_token and m > 1:
            logits = self.head.next_logits(states[:, m - 1 : -1])
            loss = loss - diffusion.next_token * self.head.output.log_prob(logits, bits[:, m:]).mean() / self.codes.bits
        return loss
