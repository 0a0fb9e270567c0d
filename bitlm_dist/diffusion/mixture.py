"""The two reductions over pattern logits that a mixture of products needs, in slices that stay in cache.

A token has R·G·P logits (about a thousand), so the plain formula would pass several times over hundreds of megabytes and keep
them for the backward pass. Here each slice of tokens is reduced, and differentiated, while it is in cache; only the gradient is
kept.

Legend: T tokens, R mixture components, G groups of bits, P patterns a group.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitlm_dist.compilation import region

CPU_SLICE, GPU_SLICE = 2**18, 2**27  # logits of a slice
RAREST = 1e-30  # least probability of a pattern: it and its reciprocal are fp32 numbers


def _slice_rows(raw: Tensor) -> int:
    return max(1, (GPU_SLICE if raw.is_cuda else CPU_SLICE) // raw.shape[-1])


def _normalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """-> log-sum over the last dimension, and the probabilities."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    return (total.log() + top).squeeze(-1), weights.div_(total)


@region
def _nll_slice(
    raw: Tensor, components: int, field: Tensor | None, index: Tensor, surplus: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """-log posterior of the patterns ``index``, and its derivative by ``raw`` if asked for.

    With a and b the log-sums over patterns without and with the field f, the posterior is
    Σ_k w_k Π_g exp(l_kgy + f_gy - a_kg) / Σ_k w_k Π_g exp(b_kg - a_kg). Its derivative by l is
    r'·q' + (r - r')·q - r·[p = y], with q, q' the pattern probabilities without and with the field, r the responsibilities of the
    components for y, r' those for the evidence.
    """
    weights, logits = split(raw, components, surplus)
    prior_sum, prior = _normalised(logits)
    base = weights - prior_sum.sum(-1)
    at = index.unsqueeze(-2).expand(logits.shape[:-1]).unsqueeze(-1)
    joint = base + logits.gather(-1, at).squeeze(-1).sum(-1)
    nll, evidence, posterior = -joint.logsumexp(-1), weights, None
    if field is not None:
        posterior_sum, posterior = _normalised(logits + field.unsqueeze(-3))
        evidence = base + posterior_sum.sum(-1)
        nll = nll - field.gather(-1, index.unsqueeze(-1)).squeeze(-1).sum(-1)
    nll = nll + evidence.logsumexp(-1)
    if not with_gradient:
        return nll, None
    r, r_evidence = joint.softmax(-1), evidence.softmax(-1)
    if posterior is None:
        by_logits = prior.mul_(r[..., None, None])
    else:
        by_logits = posterior.mul_(r_evidence[..., None, None]).addcmul_(prior, (r - r_evidence)[..., None, None])
    by_logits.scatter_add_(-1, at, -r[..., None, None].expand(at.shape))
    return nll, torch.cat((r_evidence - r, by_logits.flatten(-3)), -1)


class _MixtureNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, field: Tensor | None, index: Tensor, surplus: Tensor) -> Tensor:
        components = raw.shape[-1] // (1 + surplus.numel())
        out = torch.empty(raw.shape[0], device=raw.device)
        grad = torch.empty_like(raw, dtype=torch.float32) if raw.requires_grad else None
        rows = _slice_rows(raw)
        for first in range(0, raw.shape[0], rows):
            part = slice(first, first + rows)
            its_field = None if field is None else field[part]
            out[part], its_grad = _nll_slice(raw[part], components, its_field, index[part], surplus, grad is not None)
            if grad is not None and its_grad is not None:
                grad[part] = its_grad
        ctx.save_for_backward(grad)
        ctx.dtype = raw.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * by_out.unsqueeze(-1)).to(ctx.dtype), None, None, None


def split(raw: Tensor, components: int, surplus: Tensor) -> tuple[Tensor, Tensor]:
    """Raw output [..., R(1 + G·P)] -> mixture logits [..., R] and pattern logits [..., R, G, P], fp32.

    ``surplus`` [G, P] is -inf at patterns that a short last group does not have.
    """
    raw = raw.float()
    logits = raw[..., components:].unflatten(-1, (components, *surplus.shape))
    return raw[..., :components], logits + surplus


def mixture_nll(raw: Tensor, field: Tensor | None, index: Tensor, surplus: Tensor) -> Tensor:
    """-log posterior of tokens given their noisy bits, in nats (method, section 9 d).

    Args:
        raw: [T, R(1 + G·P)], mixture logits, then pattern logits; differentiable.
        field: <lambda_g, phi_p> of the noisy bits, [T, G, P]; None at pure noise.
        index: the tokens' pattern in each group, int64 [T, G].
        surplus: [G, P], see :func:`split`.

    Returns:
        fp32 [T].
    """
    out: Tensor = _MixtureNLL.apply(raw, field, index, surplus)
    return out


@region
def pattern_probabilities(raw: Tensor, surplus: Tensor) -> tuple[Tensor, Tensor]:
    """Raw output [T, R(1 + G·P)] -> mixture logits [T, R] and the probability of every pattern [T, G, R, P].

    Probabilities are at least ``RAREST``, so that bits which the channel leaves no doubt about are read as they are, however
    unlikely the model finds them.
    """
    weights, logits = split(raw, raw.shape[-1] // (1 + surplus.numel()), surplus)
    patterns = logits.softmax(-1).clamp_min_(RAREST)
    return weights, patterns.transpose(-2, -3).contiguous()  # each of the products to come would copy it


@region
def posterior_marginals(weights: Tensor, patterns: Tensor, field: Tensor, surplus: Tensor) -> Tensor:
    """Posterior probability of every pattern, components summed: [T, G, P].

    With p the pattern probabilities and f the field, s_kg = Σ_y p_kgy exp(f_gy) is group g's evidence for component k,
    r ~ w Π_g s_kg are the responsibilities, and the marginal of y is exp(f_gy) Σ_k r_k p_kgy / s_kg. The products over patterns
    are matrix products, and the prior's exponentials are shared by all noise levels.

    Args:
        weights, patterns: of :func:`pattern_probabilities`.
        field: <lambda_g, phi_p> of the noisy bits, [T, G, P].
        surplus: [G, P], see :func:`split`.
    """
    likely = (field + surplus).softmax(-1)
    given = torch.matmul(patterns, likely.unsqueeze(-1)).squeeze(-1)  # [T, G, R]
    r = (weights + given.log().sum(-2)).softmax(-1)
    return likely * torch.matmul((r.unsqueeze(-2) / given).unsqueeze(-2), patterns).squeeze(-2)


@torch.no_grad()
def mixture_marginals(raw: Tensor, field: Tensor, surplus: Tensor) -> Tensor:
    """:func:`posterior_marginals` from the raw output, arguments as in :func:`mixture_nll` -> [T, G, P].

    Not differentiable: as an input feature it is a constant, and as A0_hat it is only sampled or scored.
    """
    out = torch.empty_like(field)
    rows = _slice_rows(raw)
    for first in range(0, raw.shape[0], rows):
        part = slice(first, first + rows)
        out[part] = posterior_marginals(*pattern_probabilities(raw[part], surplus), field[part], surplus)
    return out
