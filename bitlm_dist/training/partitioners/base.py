"""What a partitioner is: it decides which part of the weights this rank updates.

Partitioners shard, reduce gradients and bring updated weights back to the model. Optimizers see
their partitions only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from bitlm_dist.model.initialization import shard_dim
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.partition import Partition

Update = Callable[[Sequence[Partition]], None]


class Partitioner(ABC):
    """This rank's partitions of some of the model's tensors.

    Collective: all ranks that share the tensors must call its methods in the same order.

    Args:
        partitions: the fp32 weights as the optimizer sees them.
    """

    def __init__(self, partitions: Sequence[Partition]) -> None:
        self.partitions = partitions

    @abstractmethod
    def reduce_grads(self) -> None:
        """Complete the gradients after the step's last backward pass."""

    @abstractmethod
    def grad_norm_squared(self) -> Tensor:
        """Squared norm of the full gradient of its tensors over all ranks of the job, []."""

    @abstractmethod
    def sync_model_weights(self) -> None:
        """Copy the partitions to the model's own weights."""

    def zero_grad(self) -> None:
        """Drop the gradients of the partitions."""
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


class HeadPartitioner(Partitioner):
    """Shards the head over the ranks of the last pipeline stage, and sums their gradients.

    Args:
        partitions: see :class:`Partitioner`.
        layout: the job's parallel layout.
    """

    def __init__(self, partitions: Sequence[Partition], layout: ParallelLayout) -> None:
        super().__init__(partitions)
        self._layout = layout

    @staticmethod
    def check_installed() -> None:
        """Check that the packages it needs are installed, in tested versions.

        Raises:
            UserError: they are not.
        """

    @abstractmethod
    def __call__(self, *inputs: Any) -> Tensor:
        """Run :meth:`HeadLoss.forward` on this rank's blocks.

        The gradients with respect to the inputs are local and unscaled.
        """

    @abstractmethod
    def start_microbatch(self, is_last: bool) -> None:
        """Announce the forward and backward pass of a microbatch; ``is_last``: the step's last."""

    @abstractmethod
    def grad_norm(self) -> Tensor:
        """Norm of the full gradient of the head, []. Collective over the head's ranks."""

    @override
    def grad_norm_squared(self) -> Tensor:
        grad_norm = self.grad_norm()
        norm_squared = torch.zeros((), dtype=torch.float64, device=mesh.device())
        # All tensor-parallel ranks have this norm, and the sum below must count it once.
        if self._layout.tensor_rank == 0:
            norm_squared += grad_norm.double().square()
        return mesh.all_reduce_sum_over_model(norm_squared, self._layout)


class AbsentHead(HeadPartitioner):
    """The partitioner of ranks without a head, which only learn the head's norm."""

    def __init__(self, layout: ParallelLayout) -> None:
        super().__init__([], layout)

    @override
    def __call__(self, *inputs: Any) -> Tensor:
        raise AssertionError("this rank has no head")

    @override
    def start_microbatch(self, is_last: bool) -> None:
        pass

    @override
    def reduce_grads(self) -> None:
        pass

    @override
    def grad_norm(self) -> Tensor:
        return torch.zeros((), device=mesh.device())

    @override
    def sync_model_weights(self) -> None:
        pass


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
    return (
        torch.stack(torch._foreach_norm(counted)).square().sum()
        if counted
        else torch.zeros((), device=mesh.device())
    )
