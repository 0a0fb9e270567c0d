"""Reference implementation of the training step in plain PyTorch: no Megatron, no counter-based
noise, no data pipeline.

The overhead of the stack is measured against it. The diffusion head is the same module, as it is
plain PyTorch already; the backbone uses the layer that decoding runs.

Legend: B batch, S sequence, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.diffusion.process import logit_normal_time
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.config import BackboneConfig
from bitlm_dist.model.heads.base import Conditioning
from bitlm_dist.model.heads.bitlm import BitLMHead
from bitlm_dist.model.heads.build import build_head
from bitlm_dist.model.torch_layer import LayerWeights, rotary_cos_sin, transformer_layer


class PlainLayer(nn.Module):
    """Weights of one :func:`bitlm_dist.model.torch_layer.transformer_layer`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(config.hidden_size))
        self.norm2 = nn.Parameter(torch.ones(config.hidden_size))
        self.q_norm = nn.Parameter(torch.ones(config.head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.head_dim))
        self.qkv = nn.Linear(
            config.hidden_size,
            (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
            bias=False,
        )
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)
        self.num_queries_per_kv_head = config.num_heads // config.num_kv_heads

    def weights(self) -> LayerWeights:
        """Weights as the layer function takes them."""
        # one row per head of a key-value group: its queries, then its key
        qk_norm = torch.cat(
            (self.q_norm.expand(self.num_queries_per_kv_head, -1), self.k_norm[None])
        )

        return LayerWeights(
            self.norm1,
            self.qkv.weight,
            qk_norm,
            self.out.weight,
            self.norm2,
            self.gate_up.weight,
            self.down.weight,
        )


class PlainBackbone(nn.Module):
    """Block-causal Transformer."""

    def __init__(self, config: BackboneConfig, block_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, 1e-6)
        self.block_size = block_size
        self.config = config

    def forward(self, x: Tensor, document_ids: Tensor) -> Tensor:
        """Compute the hidden states.

        Args:
            x: embeddings [B, S, D].
            document_ids: [B, S]; positions attend within their document only.

        Returns:
            Hidden states [B, S, D].
        """
        config = self.config

        # each position sees its own and earlier blocks of its document
        position = torch.arange(x.shape[1], device=x.device)
        mask = position[None, :] // self.block_size <= position[:, None] // self.block_size
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=config.num_heads != config.num_kv_heads
            )

        positions = torch.arange(x.shape[1], device=x.device)[:, None, None]
        cos, sin = rotary_cos_sin(positions, config.rope_theta, config.head_dim, x.dtype)
        for plain in self.layers:
            assert isinstance(plain, PlainLayer)
            x = transformer_layer(x, plain.weights(), cos, sin, attend, config.num_kv_heads)

        return self.norm(x)


class PlainBitLM(nn.Module):
    """Model and training loss, for sequences of whole blocks that hold one document each."""

    def __init__(self, config: Config, codes: BitCodes) -> None:
        super().__init__()
        self.config = config
        self.codes = codes
        self.embedding = BitEmbedding(
            codes.num_bits, config.model.backbone.hidden_size, config.model.input_window
        )
        self.backbone = PlainBackbone(
            config.model.backbone,
            config.model.block_size if config.model.attention == "block" else 1,
        )
        self.head = build_head(config, codes.num_bits)
        self.weights = config.diffusion.loss_weights(self.head.loss_terms)

    def loss(self, tokens: Tensor, document_ids: Tensor) -> Tensor:
        """Mean loss of the tokens after the first block.

        Args:
            tokens: token ids [B, S].
            document_ids: [B, S].
        """
        m = self.config.model.block_size
        weights = self.weights
        bits = self.codes.ids_to_bits(tokens)
        hidden = self.backbone(self.embedding(bits), document_ids)

        # each block is predicted from the hidden states of the block before it
        clean = bits.unflatten(1, (-1, m))[:, 1:].flatten(0, 1)
        conditioning = self.head.condition(hidden.unflatten(1, (-1, m))[:, :-1].flatten(0, 1))
        loss = weights["denoising"] * self._denoising_loss(clean, conditioning)
        if not isinstance(self.head, BitLMHead):
            return loss

        if "context" in weights:
            loss = loss + weights["context"] * self._nll(conditioning.context_logits, clean)
        if "autoregressive" in weights:
            logits = self.head.autoregress(clean, conditioning)
            loss = loss + weights["autoregressive"] * self._nll(logits, clean)
        if "next_token" in weights:
            logits = self.head.next_token_logits(hidden[:, m - 1 : -1])
            loss = loss + weights["next_token"] * self._nll(logits, bits[:, m:])
        return loss

    def _nll(self, logits: Tensor, bits: Tensor) -> Tensor:
        """Mean negative log-probability, per bit as the denoising loss."""
        return -self.head.output.log_prob(logits, bits).mean() / self.codes.num_bits

    def _denoising_loss(self, clean: Tensor, conditioning: Conditioning) -> Tensor:
        """Mean denoising loss of clean bits [blocks, m, bits] over all noise samples."""
        diffusion = self.config.diffusion
        clean = clean.expand(diffusion.num_noise_samples, *clean.shape)
        block_noise = torch.randn(clean.shape[:2], device=clean.device)
        token_noise = torch.randn(clean.shape[:3], device=clean.device)

        # a block has one noise level or, with the configured probability, one per token
        is_per_token = (
            torch.rand(clean.shape[:2], device=clean.device) < diffusion.per_token_noise_prob
        )
        t = torch.where(
            is_per_token[..., None],
            logit_normal_time(token_noise, diffusion.per_token_noise_sigma),
            logit_normal_time(block_noise)[..., None],
        )
        noisy = (1 - t)[..., None] * clean + t[..., None] * torch.randn_like(clean)

        prediction = self.head.denoise(noisy, t, conditioning.expand(diffusion.num_noise_samples))
        return self.head.output.loss(prediction, noisy, t, clean).mean()
