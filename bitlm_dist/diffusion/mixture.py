"""The two reductions over pattern logits that a mixture of products needs, in cache-sized slices.

A token has R·G·P logits (about a thousand), so the plain formula would pass several times over
hundreds of megabytes, and would keep them for the backward pass. Here each slice of tokens is
reduced and differentiated while it is in cache. Only its gradient is kept.

Legend: T tokens, R mixture components, G groups of bits, P patterns per group.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitlm_dist.compilation import compiled_region

# logits per slice
CPU_SLICE_NUMEL = 2**18
GPU_SLICE_NUMEL = 2**27
MIN_PATTERN_PROB = 1e-30  # both it and its reciprocal are representable in fp32


def _rows_per_slice(logits: Tensor) -> int:
    return max(1, (GPU_SLICE_NUMEL if logits.is_cuda else CPU_SLICE_NUMEL) // logits.shape[-1])


def _logsumexp_and_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log-sum-exp and the softmax over the last dimension."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    return (total.log() + top).squeeze(-1), weights.div_(total)


@compiled_region
def _nll_slice(
    logits: Tensor,
    num_components: int,
    channel_logits: Tensor | None,
    pattern_index: Tensor,
    padding_mask: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute -log posterior of the patterns and, if asked for, its derivative by ``logits``.

    With a and b the log-sums over patterns without and with the channel logits f, the posterior is
    Σ_k w_k Π_g exp(l_kgy + f_gy - a_kg) / Σ_k w_k Π_g exp(b_kg - a_kg). Its derivative by l is
    r'·q' + (r - r')·q - r·[p = y], with q, q' the pattern probabilities without and with f, r the
    responsibilities of the components for y, r' those for the evidence.
    """
    mixture_logits, pattern_logits = split_mixture_logits(logits, num_components, padding_mask)
    prior_sum, prior = _logsumexp_and_softmax(pattern_logits)
    base = mixture_logits - prior_sum.sum(-1)

    # numerator: log w_k + Σ_g (l_kgy - a_kg)
    gather_index = pattern_index.unsqueeze(-2).expand(pattern_logits.shape[:-1]).unsqueeze(-1)
    joint = base + pattern_logits.gather(-1, gather_index).squeeze(-1).sum(-1)
    nll = -joint.logsumexp(-1)

    # denominator: log w_k + Σ_g (b_kg - a_kg); without a channel b = a
    evidence = mixture_logits
    posterior = None
    if channel_logits is not None:
        posterior_sum, posterior = _logsumexp_and_softmax(
            pattern_logits + channel_logits.unsqueeze(-3)
        )
        evidence = base + posterior_sum.sum(-1)
        nll = nll - channel_logits.gather(-1, pattern_index.unsqueeze(-1)).squeeze(-1).sum(-1)
    nll = nll + evidence.logsumexp(-1)
    if not with_gradient:
        return nll, None

    # The gradient overwrites the probabilities, so the slice stays in cache.
    r = joint.softmax(-1)
    r_evidence = evidence.softmax(-1)
    if posterior is None:
        grad_pattern_logits = prior.mul_(r[..., None, None])
    else:
        grad_pattern_logits = posterior.mul_(r_evidence[..., None, None]).addcmul_(
            prior, (r - r_evidence)[..., None, None]
        )
    grad_pattern_logits.scatter_add_(
        -1, gather_index, -r[..., None, None].expand(gather_index.shape)
    )
    return nll, torch.cat((r_evidence - r, grad_pattern_logits.flatten(-3)), -1)


class _MixtureNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        channel_logits: Tensor | None,
        pattern_index: Tensor,
        padding_mask: Tensor,
    ) -> Tensor:
        """Compute the loss and, if needed, its gradient, slice by slice."""
        num_components = logits.shape[-1] // (1 + padding_mask.numel())
        out = torch.empty(logits.shape[0], device=logits.device)
        grad = torch.empty_like(logits, dtype=torch.float32) if logits.requires_grad else None

        rows_per_slice = _rows_per_slice(logits)
        for first in range(0, logits.shape[0], rows_per_slice):
            rows = slice(first, first + rows_per_slice)
            slice_channel_logits = None if channel_logits is None else channel_logits[rows]
            out[rows], slice_grad = _nll_slice(
                logits[rows],
                num_components,
                slice_channel_logits,
                pattern_index[rows],
                padding_mask,
                grad is not None,
            )
            if grad is not None and slice_grad is not None:
                grad[rows] = slice_grad

        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale the gradient that ``forward`` saved."""
        (grad,) = ctx.saved_tensors
        return (grad * grad_out.unsqueeze(-1)).to(ctx.dtype), None, None, None


def split_mixture_logits(
    logits: Tensor, num_components: int, padding_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Split the raw output into mixture logits and masked pattern logits.

    Args:
        logits: [..., R(1 + G·P)].
        num_components: R.
        padding_mask: [G, P], -inf at patterns that a short last group does not have.

    Returns:
        Mixture logits [..., R] and pattern logits [..., R, G, P], both fp32.
    """
    logits = logits.float()
    pattern_logits = logits[..., num_components:].unflatten(
        -1, (num_components, *padding_mask.shape)
    )
    return logits[..., :num_components], pattern_logits + padding_mask


def mixture_nll(
    logits: Tensor, channel_logits: Tensor | None, pattern_index: Tensor, padding_mask: Tensor
) -> Tensor:
    """Compute -log posterior of tokens given their noisy bits, in nats (docs/recipe.md).

    Args:
        logits: [T, R(1 + G·P)], mixture logits, then pattern logits; differentiable.
        channel_logits: <lambda_g, phi_p> of the noisy bits, [T, G, P]; None at pure noise.
        pattern_index: the pattern of the tokens in each group, int64 [T, G].
        padding_mask: [G, P], see :func:`split_mixture_logits`.

    Returns:
        fp32 [T].
    """
    out: Tensor = _MixtureNLL.apply(logits, channel_logits, pattern_index, padding_mask)
    return out


@compiled_region
def pattern_probabilities(logits: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Split the raw output into mixture logits and pattern probabilities.

    Probabilities are at least ``MIN_PATTERN_PROB``. So bits that the channel makes certain are read
    as they are, however improbable the model finds them.

    Args:
        logits: [T, R(1 + G·P)].
        padding_mask: [G, P], see :func:`split_mixture_logits`.

    Returns:
        Mixture logits [T, R] and the probability of every pattern [T, G, R, P].
    """
    mixture_logits, pattern_logits = split_mixture_logits(
        logits, logits.shape[-1] // (1 + padding_mask.numel()), padding_mask
    )
    pattern_probs = pattern_logits.softmax(-1).clamp_min_(MIN_PATTERN_PROB)

    # contiguous, because each of the matrix products to come would copy it
    return mixture_logits, pattern_probs.transpose(-2, -3).contiguous()


@compiled_region
def posterior_marginals(
    mixture_logits: Tensor, pattern_probs: Tensor, channel_logits: Tensor, padding_mask: Tensor
) -> Tensor:
    """Compute the posterior probability of every pattern, summed over components.

    With p the pattern probabilities and f the channel logits, s_kg = Σ_y p_kgy exp(f_gy) is group
    g's evidence for component k, r ~ w Π_g s_kg are the responsibilities, and the marginal of y is
    exp(f_gy) Σ_k r_k p_kgy / s_kg. The sums over patterns are matrix products, and all noise levels
    share the exponentials of the prior.

    Args:
        mixture_logits, pattern_probs: from :func:`pattern_probabilities`.
        channel_logits: <lambda_g, phi_p> of the noisy bits, [T, G, P].
        padding_mask: [G, P], see :func:`split_mixture_logits`.

    Returns:
        [T, G, P].
    """
    # The softmax scales exp(f) per group, which cancels in the marginals and cannot overflow.
    likelihood = (channel_logits + padding_mask).softmax(-1)
    # component_evidence: [T, G, R]
    component_evidence = torch.matmul(pattern_probs, likelihood.unsqueeze(-1)).squeeze(-1)
    r = (mixture_logits + component_evidence.log().sum(-2)).softmax(-1)

    return likelihood * torch.matmul(
        (r.unsqueeze(-2) / component_evidence).unsqueeze(-2), pattern_probs
    ).squeeze(-2)


@torch.no_grad()
def mixture_marginals(logits: Tensor, channel_logits: Tensor, padding_mask: Tensor) -> Tensor:
    """Compute :func:`posterior_marginals` [T, G, P] from the raw output.

    Not differentiable: as an input feature it is a constant, and as A0_hat it is only sampled or
    scored. The arguments are those of :func:`mixture_nll`.
    """
    out = torch.empty_like(channel_logits)
    rows_per_slice = _rows_per_slice(logits)
    for first in range(0, logits.shape[0], rows_per_slice):
        rows = slice(first, first + rows_per_slice)
        out[rows] = posterior_marginals(
            *pattern_probabilities(logits[rows], padding_mask), channel_logits[rows], padding_mask
        )
    return out
