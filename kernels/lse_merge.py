"""Block-causal attention as the merge of two exact parts: causal flash attention, and the later
tokens of the same block.

A token attends to all tokens before it and to the later ones of its own block. The first part is
causal attention, for which every library has a flash kernel (flash.py). The second part is the
strict upper triangle of each M x M block, with O(S M) scores. Each part yields its output and the
log-sum-exp of its scores. Weighted by their fractions of the common normalizer, the outputs add up
to the full softmax.

The backward pass is exact too. A flash backward recomputes its probabilities from the log-sum-exp
that it is given. Given the merged log-sum-exp and the merged output, it computes its part of the
full gradient, and the part of the triangle is added.

Legend: B batch, H query heads, G key-value heads, R = H / G, S queries, T keys, N blocks of
queries, M tokens per block, D head dimension.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from bitlm_dist.kernels.attention_inputs import AttentionInputs
from bitlm_dist.kernels.flash import select_flash, unsupported_reason

__all__ = ["attention", "unsupported_reason"]


def attention(inputs: AttentionInputs) -> Tensor:
    """Compute block-causal attention; differentiable.

    Returns:
        [B, H, S, D].
    """
    out: Tensor = _LSEMergedAttention.apply(inputs.q, inputs.k, inputs.v, inputs)
    return out


class _LSEMergedAttention(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
        # the flash kernels require a contiguous last dimension
        inputs = inputs.with_qkv(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)))

        ctx.flash = select_flash(inputs)
        out, lse = ctx.flash.forward(inputs)
        if inputs.block > 1:  # else the triangle is empty
            out, lse = _Triangle(inputs).merge_with(out, lse)

        ctx.save_for_backward(inputs.q, inputs.k, inputs.v, out, lse, inputs.document_bounds)
        ctx.block = inputs.block
        ctx.scale = inputs.scale
        return out

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, out, lse, bounds = ctx.saved_tensors
        (dout,) = gradients
        inputs = AttentionInputs(q, k, v, ctx.block, bounds, ctx.scale)

        # out and lse are the merged ones, so both parts are gradients of the full softmax
        flash_grads = ctx.flash.backward(inputs, dout, out, lse)
        if inputs.block > 1:
            _Triangle(inputs).add_gradients(dout, out, lse, *flash_grads)

        return *flash_grads, None


class _Triangle:
    """Attention of tokens to the later tokens of their own block.

    Tensors are [B, G, N, R M, …]: the R query heads of a group are rows of one matrix.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        self._q_shape = inputs.q.shape
        self._num_kv_heads = inputs.k.shape[1]
        self._block_size = inputs.block
        self._scale = inputs.scale
        self._num_blocks = -(-inputs.q.shape[2] // inputs.block)
        self._num_past_keys = inputs.num_past_keys

        # dtype of scores and probabilities
        self._compute_dtype = torch.promote_types(inputs.q.dtype, torch.float32)

        # Past keys fill whole blocks, so no query attends to one of them through the triangle.
        self._q = self._to_query_blocks(inputs.q)
        self._k, self._v = (
            self._to_key_blocks(x[:, :, self._num_past_keys :]) for x in (inputs.k, inputs.v)
        )

        scores = (self._q.to(self._compute_dtype) @ self._k.to(self._compute_dtype).mT).mul_(
            inputs.scale
        )
        self._scores = self._split_heads(scores).masked_fill_(
            self._hidden_mask(inputs.document_bounds), -math.inf
        )

    def _pad_to_full_blocks(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Pad dimension 2 to a multiple of the block size."""
        num_missing = self._num_blocks * self._block_size - self._q_shape[2]
        return (
            F.pad(x, (0, 0) * (x.dim() - 3) + (0, num_missing), value=value) if num_missing else x
        )

    def _to_query_blocks(self, x: Tensor) -> Tensor:
        """Convert [B, H, S, …] to [B, G, N, R M, …]."""
        rest = x.shape[3:]
        padded = self._pad_to_full_blocks(x).reshape(
            x.shape[0], self._num_kv_heads, -1, self._num_blocks, self._block_size, *rest
        )
        return padded.transpose(2, 3).reshape(
            x.shape[0], self._num_kv_heads, self._num_blocks, -1, *rest
        )

    def _to_key_blocks(self, x: Tensor) -> Tensor:
        """Convert [B, G, S, D] to [B, G, N, M, D]."""
        return self._pad_to_full_blocks(x).reshape(
            *x.shape[:2], self._num_blocks, self._block_size, x.shape[3]
        )

    def _split_heads(self, x: Tensor) -> Tensor:
        """Convert [B, G, N, R M, M] to [B, G, N, R, M, M]."""
        return x.unflatten(3, (-1, self._block_size))

    def _from_query_blocks(self, x: Tensor) -> Tensor:
        """Convert [B, G, N, R M, …] to [B, H, S, …]."""
        rest = x.shape[4:]
        padded = (
            x.unflatten(3, (-1, self._block_size))
            .transpose(2, 3)
            .reshape(self._q_shape[0], self._q_shape[1], -1, *rest)
        )
        return padded[:, :, : self._q_shape[2]]

    def _hidden_mask(self, bounds: Tensor | None) -> Tensor:
        """Mask of the keys (columns) that a query (row) does not attend to in this part.

        Returns:
            bool [1 or B, 1, N, 1, M, M].
        """
        later = torch.ones(
            self._block_size, self._block_size, dtype=torch.bool, device=self._q.device
        ).triu(1)
        positions = torch.arange(self._num_blocks * self._block_size, device=self._q.device).view(
            1, 1, self._num_blocks, 1, 1, self._block_size
        )

        # the padding of the last block is hidden
        if bounds is None:
            return ~(later & (positions < self._q_shape[2]))

        # a document may end within a block; its end counts from the first query
        ends = self._pad_to_full_blocks(
            bounds[1, :, None, self._num_past_keys :, None] - self._num_past_keys
        )
        return ~(later & (positions < ends.view(-1, 1, self._num_blocks, 1, self._block_size, 1)))

    def _probabilities(self, lse: Tensor) -> Tensor:
        """Probabilities [B, G, N, R M, M] of the softmax that ``lse`` [B, H, S] normalizes."""
        return (self._scores.flatten(3, 4) - self._to_query_blocks(lse).unsqueeze(-1)).exp_()

    def merge_with(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge with the output and log-sum-exp of the causal part.

        Args:
            out: [B, H, S, D].
            lse: [B, H, S].

        Returns:
            out, lse: of the full softmax, in the same shapes.
        """
        merged_lse = torch.logaddexp(
            lse, self._from_query_blocks(self._scores.flatten(3, 4).logsumexp(-1))
        )

        # normalized by the merged sum already, so only the causal part is rescaled
        triangle_out = self._from_query_blocks(
            self._probabilities(merged_lse).to(out.dtype) @ self._v
        )
        return torch.addcmul(
            triangle_out, out, (lse - merged_lse).exp_().unsqueeze(-1).to(out.dtype)
        ), merged_lse

    def add_gradients(
        self, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Add the gradients of this part to dq, dk and dv, in place."""
        p = self._probabilities(lse)
        g = self._to_query_blocks(dout)

        # softmax backward: dS = P * (dP - sum(dO * O))
        delta = self._to_query_blocks(
            (dout.to(self._compute_dtype) * out.to(self._compute_dtype)).sum(-1)
        )
        ds = (
            (g.to(self._compute_dtype) @ self._v.to(self._compute_dtype).mT)
            .sub_(delta.unsqueeze(-1))
            .mul_(p)
            .mul_(self._scale)
            .to(g.dtype)
        )

        # the heads of a group are rows, so the products sum dk and dv over them
        dq += self._from_query_blocks(ds @ self._k)
        num_queries = self._q_shape[2]
        dk[:, :, self._num_past_keys :] += (ds.mT @ self._q).flatten(2, 3)[:, :, :num_queries]
        dv[:, :, self._num_past_keys :] += (p.to(g.dtype).mT @ g).flatten(2, 3)[:, :, :num_queries]
