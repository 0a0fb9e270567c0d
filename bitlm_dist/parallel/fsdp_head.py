"""The head under torch's FSDP2, as an alternative to ZeRO.

Gradients and optimizer state are sharded; at stage 3 the weights stay sharded between forward and
backward, too. Weights are kept in fp32; with ``training.precision: bf16`` they are gathered in
bf16.
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
from bitlm_dist.parallel.partition import ParamRange, Partition


class FsdpHead:
    """A module sharded by FSDP2 over the ranks of the head.

    It implements :class:`~bitlm_dist.training.sharded_head.HeadEngine`.

    Args:
        config: the checked config.
        module: the module with the head's parameters; its forward returns this rank's part of the
            loss.
        blocks: submodules that are gathered one by one; the rest is gathered at once.
    """

    def __init__(self, config: Config, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._group = mesh.head_group()
        settings: dict[str, Any] = {
            "mesh": DeviceMesh.from_group(self._group, mesh.device().type),
            "reshard_after_forward": config.parallel.head.zero_stage == 3,
        }
        if config.training.precision == "bf16":
            settings["mp_policy"] = MixedPrecisionPolicy(
                torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

        self._module: Any = module.float()
        for part in (*blocks, module):
            fully_shard(part, **settings)  # type: ignore[call-overload]
            # each rank has a part of one loss, so gradients are summed, not averaged
            part.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]

        self._parameters: dict[str, Any] = dict(module.named_parameters())
        # the optimizer sees plain tensors in the same memory
        self._partitions = [self._build_partition(n, p) for n, p in self._parameters.items()]

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Run the module's forward pass."""
        loss, terms = self._module(batch)
        return loss, terms

    def start_microbatch(self, is_last: bool) -> None:
        """Announce the next microbatch. The gradients of each are reduced at once."""
        self._module.set_is_last_backward(is_last)

    def reduce_grads(self) -> None:
        """Hand the reduced gradients to the partitions."""
        for parameter, partition in zip(self._parameters.values(), self._partitions, strict=True):
            partition.flat.grad = None if parameter.grad is None else parameter.grad.to_local()

    def grad_norm(self) -> float:
        """Norm of the full gradient of the head. Collective over its ranks."""
        grads = [p.flat.grad for p in self._partitions if p.flat.grad is not None]

        # the ranks' rows are disjoint, so squared norms add up
        norm_squared = torch.stack(torch._foreach_norm(grads)).square().sum()
        dist.all_reduce(norm_squared, group=self._group)
        return float(norm_squared.sqrt())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer update the partitions, and drop the gradients."""
        optimizer.step()
        for parameter, partition in zip(self._parameters.values(), self._partitions, strict=True):
            parameter.grad = partition.flat.grad = None

    def partitions(self) -> list[Partition]:
        """The fp32 weights as the optimizer sees them: this rank's rows of each tensor."""
        return self._partitions

    def sync_model_weights(self) -> None:
        """Do nothing: the partitions are the weights."""

    def _build_partition(self, name: str, parameter: Any) -> Partition:
        # FSDP2 shards rows; the last ranks may have fewer of them
        full_shape = parameter.shape
        num_local_rows = -(-full_shape[0] // dist.get_world_size(self._group))
        shard_numel = num_local_rows * (full_shape.numel() // full_shape[0])

        return Partition(
            parameter.to_local().detach(),
            [ParamRange(name, full_shape, 0, shard_numel)],
            self._group,
            shard_numel,
        )
