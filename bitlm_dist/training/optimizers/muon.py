"""torch's Muon with batched orthogonalisation, in a dtype that the device is fast in.

torch.optim.Muon iterates in bfloat16, one matrix at a time. That suits a GPU, but on a CPU without
bfloat16 units it takes longer than the rest of the training step. Here, matrices of one shape are
orthogonalised together, and the ranks that share matrices divide them by the FLOPs that they take.
Hyper-parameters, state and update rule are torch's.

DeepSpeed's own Muon orthogonalises gradients while it reduces them. At that time their joint norm
with the backbone's is not known, so they could not be clipped as here.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.partition import Partition, map_full_tensors
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizers.base import assign_if

# Coefficients, steps and eps of torch.optim.Muon: a x + b x^3 + c x^5.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
NUM_STEPS = 5
EPS = 1e-7


def orthogonalize(matrices: Tensor) -> Tensor:
    """Iterate towards the nearest orthogonal matrices (Newton-Schulz; Jordan et al., 2024).

    Args:
        matrices: [n, rows, columns], in the dtype to compute in.

    Returns:
        [n, rows, columns].
    """
    a, b, c = COEFFICIENTS

    # The Gram matrix is cheaper on the shorter side.
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices

    # The iteration converges only if no singular value exceeds 1.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(EPS)
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalize_flops(shape: torch.Size) -> int:
    """FLOPs of :func:`orthogonalize` for matrices [..., rows, columns]."""
    *stacked, rows, columns = shape
    short, long = sorted((rows, columns))
    return NUM_STEPS * math.prod(stacked) * (4 * short**2 * long + 2 * short**3)


class Muon:
    """Steps along the orthogonalised momentum, scaled by sqrt(max(1, rows/columns)).

    An :class:`~bitlm_dist.training.optimizers.base.UpdateRule` for matrices, and for tensors
    [..., rows, columns], which are stacks of them.

    Args:
        config: peak learning rate and momentum.
    """

    is_elementwise = False

    def __init__(self, config: OptimizerConfig) -> None:
        self.peak_lr = config.muon_lr
        self._momentum = config.muon_momentum

    def init_state(self, flat: Tensor) -> dict[str, Tensor]:
        """The momentum."""
        return {"momentum_buffer": torch.zeros_like(flat)}

    def update(
        self, partitions: Sequence[Partition], lr: float, weight_decay: float, applied: Tensor
    ) -> None:
        """Update the partitions, see the base class."""
        grads = [p.grad for p in partitions]
        buffers = [p.state["momentum_buffer"] for p in partitions]

        # Nesterov momentum, as in torch.optim.Muon. Its directions overwrite the gradients.
        for buffer, grad in zip(buffers, grads, strict=True):
            assign_if(applied, buffer, buffer.lerp(grad, 1 - self._momentum))
        torch._foreach_lerp_(grads, buffers, self._momentum)

        # Exact in fp32, and half the bytes where bfloat16 is fast.
        dtype = torch.bfloat16 if mesh.device().type == "cuda" else torch.float32
        map_full_tensors(partitions, grads, _orthogonalize_all, orthogonalize_flops, dtype)

        for partition, direction in zip(partitions, grads, strict=True):
            # The scale of one matrix is in its step size, as in torch.optim.Muon; the matrices of a
            # flat partition have different ones.
            scales = [_scale(param_range.shape) for param_range in partition.param_ranges]
            step_size = lr * scales[0] if len(scales) == 1 else lr
            if len(scales) > 1:
                for param_range, scale in zip(partition.param_ranges, scales, strict=True):
                    direction[param_range.row_slices[partition.group_rank]] *= scale

            # Decoupled weight decay, as in AdamW.
            decayed = partition.flat * (1 - lr * weight_decay)
            assign_if(applied, partition.flat, decayed.add_(direction, alpha=-step_size))


def _scale(shape: torch.Size) -> float:
    """The factor on the updates of matrices [..., rows, columns]."""
    return math.sqrt(max(1.0, shape[-2] / shape[-1]))


def _orthogonalize_all(tensors: list[Tensor]) -> list[Tensor]:
    """Orthogonalise matrices and stacks of them; those of one shape in one batch."""
    indices_by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        indices_by_shape[tensor.shape[-2:]].append(index)

    results = list(tensors)
    for shape, indices in indices_by_shape.items():
        stacks = [tensors[i].reshape(-1, *shape) for i in indices]
        stacked = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
        orthogonalized = orthogonalize(stacked).split([len(stack) for stack in stacks])
        for i, result in zip(indices, orthogonalized, strict=True):
            results[i] = result.view_as(tensors[i])
    return results
