"""The head under torch's FSDP2, to be measured beside ZeRO: gradients and optimizer state are split, weights too at stage 3.

Weights are kept in fp32; with ``training.precision: bf16`` they are gathered in bf16.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bitlm_dist.config import Config
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.partition import Partition, Piece


class FsdpHead:
    """A module under FSDP2 over the head's ranks; see :class:`~bitlm_dist.training.sharded_head.HeadEngine`.

    Args:
        config: checked.
        module: with the head's parameters; its forward returns this rank's share of the loss.
        blocks: parts of it that are gathered one by one; the rest is gathered at once.
    """

    def __init__(self, config: Config, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._group = mesh.head_group()
        settings: dict[str, Any] = {
            "mesh": DeviceMesh.from_group(self._group, mesh.device().type),
            "reshard_after_forward": config.head.zero_stage == 3,
        }
        if config.training.precision == "bf16":
            settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._module: Any = module.float()
        for part in (*blocks, module):
            fully_shard(part, **settings)  # type: ignore[call-overload]
            part.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # each rank has a share of one loss: add
            part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        self._named: dict[str, Any] = dict(module.named_parameters())
        # the optimizer sees plain tensors in the same memory
        self._partitions = [self._partition(n, p) for n, p in self._named.items()]

    def __call__(self, context: Tensor, states: Tensor, *rest: Any) -> Tensor:
        """Forward of the module."""
        loss: Tensor = self._module(context, states, *rest)
        return loss

    def begin(self, last: bool) -> None:
        """The next forward and backward are of a microbatch, the step's last or not; all are reduced as they come."""
        self._module.set_is_last_backward(last)

    def reduce(self) -> None:
        """Gradients become those of the partitions."""
        for parameter, partition in zip(self._named.values(), self._partitions, strict=True):
            partition.flat.grad = None if parameter.grad is None else parameter.grad.to_local()

    def norm(self) -> float:
        """Of the whole gradient of the head."""
        grads = [p.flat.grad for p in self._partitions if p.flat.grad is not None]
        squares = torch.stack(torch._foreach_norm(grads)).square().sum()
        dist.all_reduce(squares, group=self._group)
        return float(squares.sqrt())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer update the partitions, and forget the gradients."""
        optimizer.step()
        for parameter, partition in zip(self._named.values(), self._partitions, strict=True):
            parameter.grad = partition.flat.grad = None

    def partitions(self) -> list[Partition]:
        """The fp32 weights as the optimizer sees them: rows of each tensor."""
        return self._partitions

    def publish(self) -> None:
        """The partitions are the weights."""

    def _partition(self, name: str, parameter: Any) -> Partition:
        whole = parameter.shape
        rows = -(-whole[0] // dist.get_world_size(self._group))
        share = rows * (whole.numel() // whole[0])
        return Partition(parameter.to_local().detach(), [Piece(name, whole, 0, share)], self._group, share)
