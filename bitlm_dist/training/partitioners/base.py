"""What a partitioner is: it decides which part of the weights this rank updates.

Partitioners shard, reduce gradients and bring updated weights back to the model. Optimizers see
their partitions only.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from bitlm_dist.model.head_loss import HeadBatch
from bitlm_dist.model.initialization import shard_dim
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.partition import Partition
from bitlm_dist.parallel.sharded_tensor import ShardedTensor

Update = Callable[[Sequence[Partition]], None]


class Partitioner:
    """This rank's partitions of some of the model's tensors.

    Collective: all ranks that share the tensors must call its methods in the same order.

    Args:
        layout: the job's parallel layout.
    """

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
        self.partitions: list[Partition] = []  # the fp32 weights as the optimizer sees them

    def reduce_grads(self) -> None:
        """Complete the gradients after the step's last backward pass."""

    def grad_norm_squared(self) -> Tensor:
        """Squared norm of the full gradient of its tensors over all ranks of the job, []."""
        raise NotImplementedError

    def sync_model_weights(self) -> None:
        """Copy the partitions to the model's own weights, where these are others."""

    def finish_weight_sync(self) -> None:
        """Wait for weights of other ranks that :meth:`sync_model_weights` left on their way."""

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for partition in self.partitions:
            partition.flat.grad = None

    def step(self, update: Update) -> None:
        """Update the partitions, copy them to the model's weights, and drop the gradients.

        Args:
            update: updates partitions by their gradients; to be called with each partition once.
        """
        update(self.partitions)
        self.sync_model_weights()
        self.zero_grad()

    def model_state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's shards of the weights, in the dtype that the model computes in.

        If that is fp32, they share the partitions' memory.
        """
        return {
            name: local.to(partition.weight_dtype)
            for partition in self.partitions
            for name, local in partition.to_sharded_tensors(partition.flat).items()
        }

    def full_state_dict(self) -> dict[str, Tensor]:
        """The full fp32 weights by name. Collective."""
        return dict(item for p in self.partitions for item in p.full_tensors().items())


class HeadPartitioner(Partitioner):
    """Shards the head over the ranks of the last pipeline stage, and sums their gradients.

    Ranks of other stages have this class itself, without partitions: they only learn the norm.
    """

    @staticmethod
    def check_installed() -> None:
        """Check that the packages it needs are installed, in tested versions.

        Raises:
            UserError: they are not.
        """

    def __call__(self, batch: HeadBatch) -> tuple[Tensor, Tensor]:
        """Run :meth:`HeadLoss.forward` on this rank's blocks.

        The gradients with respect to ``batch.context`` and ``batch.states`` are local and unscaled.
        """
        raise NotImplementedError

    def start_microbatch(self, is_last: bool) -> None:
        """Announce the forward and backward pass of a microbatch; ``is_last``: the step's last."""

    def grad_norm(self) -> Tensor:
        """Norm of the full gradient of the head, []. Collective over the head's ranks."""
        return torch.zeros((), device=mesh.device())

    @override
    def grad_norm_squared(self) -> Tensor:
        # All tensor-parallel ranks have this norm, and the sum must count it once.
        counted = self.grad_norm().double().square() * (self._layout.tensor_rank == 0)
        # The norm of an offloaded head is in host memory; this sum is on the device all the same.
        norm_squared = torch.zeros((), dtype=torch.float64, device=mesh.device()) + counted
        return mesh.all_reduce_sum_over_model(norm_squared, self._layout)


def local_grad_norm_squared(grads: Sequence[tuple[str, Tensor]], layout: ParallelLayout) -> Tensor:
    """This rank's contribution to the squared norm of the full gradient.

    Args:
        grads: gradients by the parameters' global names.
        layout: the job's parallel layout.
    """
    # Tensors that are replicated over tensor-parallel ranks count once, on the first of these.
    counted = [
        grad for name, grad in grads if layout.tensor_rank == 0 or shard_dim(name) is not None
    ]
    norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=mesh.device())]
    return torch.stack([*norms]).square().sum()
