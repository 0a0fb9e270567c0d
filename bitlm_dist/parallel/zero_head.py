"""The head under DeepSpeed's ZeRO, while Megatron-core drives the backbone in the same step.

Only the ranks of the last pipeline stage use it. DeepSpeed's data-parallel group is all of them:
tensor-, context- and data-parallel ranks, as each denoises its own blocks. DeepSpeed shards,
gathers and reduces. Updates are left to the optimizer that it is given, which sees flat fp32
partitions.

DeepSpeed assumes that one engine owns the job. Three measures confine it to its group: an ``mpu``
that names the group, a backend in which "no group" means that group (DeepSpeed's barriers and
broadcasts name none), and no compiled ops.

Legend: G ranks of the head, L elements per flat partition.
"""

import importlib.metadata
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitlm_dist.compilation import no_torch_compile
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.partition import ParamRange, Partition

TESTED_DEEPSPEED_VERSIONS = ("0.19.8",)  # private names are used here

# collectives to which DeepSpeed passes the group as a keyword argument
CALLED_BY_NAME = (
    "broadcast",
    "broadcast_object_list",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "gather",
    "scatter",
    "barrier",
    "monitored_barrier",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
)
MAX_BUCKET_NUMEL = 5 * 10**8  # elements; DeepSpeed's own default
PARAM_PERSISTENCE_THRESHOLD = 4096  # elements; smaller parameters stay unsharded at stage 3


def check_deepspeed() -> None:
    """Check that a tested version of DeepSpeed is installed.

    Raises:
        UserError: DeepSpeed is missing, or its version is not tested.
    """
    tested = " or ".join(TESTED_DEEPSPEED_VERSIONS)
    engine = "parallel.head.engine = deepspeed"
    other = "or set parallel.head.engine = fsdp2 or replicated"

    try:
        installed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{engine}: DeepSpeed is not installed: install {tested}, {other}"
        ) from None

    # a local version such as 0.19.8+abc counts, too
    if installed.partition("+")[0] not in TESTED_DEEPSPEED_VERSIONS:
        raise UserError(
            f"{engine}: DeepSpeed {installed} is installed, but tested is {tested}: "
            f"install that, {other}"
        )


def _group_backend(group: dist.ProcessGroup) -> Any:
    """A communication backend of DeepSpeed whose world is ``group``; ranks are those within it."""
    from deepspeed.comm.torch import TorchBackend

    ranks = dist.get_process_group_ranks(group)

    def inside(method: Callable[..., Any]) -> Callable[..., Any]:
        """Make ``group`` the default of a collective, and translate its source or destination."""

        def call(self: Any, *args: Any, **named: Any) -> Any:
            """Call the collective."""
            if named.get("group") in (None, dist.group.WORLD):
                named["group"] = group
                # these are ranks in DeepSpeed's world; torch expects ranks of the job
                for end in ("src", "dst"):
                    if named.get(end) is not None:
                        named[end] = ranks[named[end]]
            return method(self, *args, **named)

        return call

    def new_group(self: Any, wanted: Any) -> dist.ProcessGroup:
        """The head's group itself: DeepSpeed must not ask for any other."""
        assert list(wanted) == list(range(len(ranks))), (
            f"DeepSpeed asks for a group {list(wanted)} inside the head's"
        )
        return group

    def all_reduce(
        self: Any,
        tensor: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        """All-reduce; DeepSpeed passes its arguments by position, ``inside`` needs the names."""
        return plain_all_reduce(self, tensor, op=op, group=group, async_op=async_op)

    def inference_all_reduce(
        self: Any, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None
    ) -> Any:
        """All-reduce without DeepSpeed's compiled op."""
        return all_reduce(self, tensor, op, group)

    plain_all_reduce = inside(TorchBackend.all_reduce)
    plain_rank = inside(TorchBackend.get_rank)
    plain_size = inside(TorchBackend.get_world_size)

    methods: dict[str, Any] = {name: inside(getattr(TorchBackend, name)) for name in CALLED_BY_NAME}
    methods |= {
        "new_group": new_group,
        "all_reduce": all_reduce,
        "inference_all_reduce": inference_all_reduce,
        # DeepSpeed passes the group of these two by position
        "get_rank": lambda self, group=None: plain_rank(self, group=group),
        "get_world_size": lambda self, group=None: plain_size(self, group=group),
    }

    backend_class = type("HeadBackend", (TorchBackend,), methods)
    return backend_class(dist.get_backend(group), None, None)


class _Mpu:
    """DeepSpeed's model-parallel unit. All ranks of the head are data-parallel ranks in it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Group of the head's ranks."""
        return self._group

    def get_data_parallel_rank(self) -> int:
        """Rank within the head's group."""
        return dist.get_rank(self._group)

    def get_data_parallel_world_size(self) -> int:
        """Number of the head's ranks."""
        return dist.get_world_size(self._group)

    def get_model_parallel_group(self) -> None:
        """None: there is no model parallelism."""

    def get_model_parallel_rank(self) -> int:
        """0: there is no model parallelism."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """1: there is no model parallelism."""
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class _ScaleGradient(torch.autograd.Function):
    """The identity; its backward pass multiplies the gradient by ``scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Return a view of ``x``."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Scale the gradient."""
        return grad * ctx.scale, None


def _deepspeed_config(config: Config, on_cuda: bool, numel: int) -> dict[str, Any]:
    """DeepSpeed's config. It leaves accumulation, clipping and schedule to the caller.

    Args:
        config: the checked config.
        on_cuda: whether the head computes on a GPU.
        numel: number of elements of the head's weights.
    """
    head = config.parallel.head
    zero: dict[str, Any] = {
        "stage": head.zero_stage,
        "overlap_comm": on_cuda and head.zero_stage > 0,
    }

    # buckets need not be larger than the head; DeepSpeed refuses odd sizes
    bucket_numel = min(numel + numel % 2, MAX_BUCKET_NUMEL)
    zero |= {"reduce_bucket_size": bucket_numel, "allgather_bucket_size": bucket_numel}

    if head.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PARAM_PERSISTENCE_THRESHOLD
    if head.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
    if head.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_cuda}

    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # start_microbatch sets the boundary of a step
        "gradient_clipping": 0.0,  # the default, 1.0, would clip the head alone
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's would have to be compiled
        "zero_optimization": zero,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


class ZeroHead:
    """A module sharded by ZeRO over the ranks of the head.

    It implements :class:`~bitlm_dist.training.sharded_head.HeadEngine`.

    Args:
        config: the checked config.
        module: the module with the head's parameters; its forward returns this rank's part of the
            loss.
        optimizer: the optimizer of the weights. DeepSpeed replaces its parameters by flat
            partitions; :meth:`partitions` tells which weights are in them.
    """

    def __init__(self, config: Config, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        local_device = mesh.device()
        if local_device.type == "cpu":
            # otherwise every rank logs that it found no accelerator
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        else:
            # DeepSpeed takes this for the index of its GPU among the visible ones
            os.environ["LOCAL_RANK"] = str(local_device.index)

        with no_torch_compile():
            import deepspeed

            # DeepSpeed loads its own Muon, unused here, later and outside this context
            import deepspeed.runtime.zero.muon.muon_optimizer
        import deepspeed.ops
        from deepspeed.comm import comm

        # it warns that the optimizer is not one of its own
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # No compiled op is used. DeepSpeed would try all of them, with warnings, and compile one
        # for minutes.
        vars(deepspeed.ops)["__compatible_ops__"] = {}

        group = mesh.head_group()
        comm.cdb = _group_backend(group)
        self.zero_stage = config.parallel.head.zero_stage
        self._num_ranks = dist.get_world_size(group)
        self._group = group

        self._names = {p: n for n, p in module.named_parameters()}
        self._engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_deepspeed_config(
                config, local_device.type == "cuda", sum(p.numel() for p in self._names)
            ),
            mpu=_Mpu(group),
            dist_init_required=False,
        )
        self._zero: Any = self._engine.optimizer

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Run the module's forward pass.

        DeepSpeed averages gradients over the head's ranks. Each rank has a part of one loss, so
        they must be summed: the gradient is multiplied by G for the head, and divided by G again
        for the backbone.
        """
        batch = batch._replace(
            context=_ScaleGradient.apply(batch.context, 1 / self._num_ranks),
            states=_ScaleGradient.apply(batch.states, 1 / self._num_ranks),
        )

        # At stage 0 DeepSpeed's engine insists on calling the backward pass itself, though it has
        # nothing to do before :meth:`reduce_grads`.
        forward = self._engine.module if self.zero_stage == 0 else self._engine
        loss, terms = forward(batch)
        return _ScaleGradient.apply(loss, float(self._num_ranks)), terms

    def start_microbatch(self, is_last: bool) -> None:
        """Announce the next microbatch; the step's last one completes the reduction."""
        self._engine.set_gradient_accumulation_boundary(is_last)

    def reduce_grads(self) -> None:
        """Finish the reduction after the last backward pass; stages 1 to 3 reduce during it."""
        if self.zero_stage == 0:
            self._engine.allreduce_gradients()

    def grad_norm(self) -> float:
        """Norm of the full gradient of the head; NaN if it is not finite. Collective."""
        if self.zero_stage == 0:
            return float(
                torch.stack(
                    torch._foreach_norm([p.grad for p in self._names if p.grad is not None])
                ).norm()
            )

        from deepspeed.runtime.utils import combine_grad_norm_groups

        total_norm = (
            combine_grad_norm_groups(self._zero._get_norm_groups())
            if self.zero_stage == 3
            else self._zero.scaled_global_norm()
        )

        # DeepSpeed returns -1 if it is not finite
        return float(total_norm) if float(total_norm) >= 0 else float("nan")

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer update the partitions, all-gather the weights, drop the gradients.

        Args:
            optimizer: unused, as DeepSpeed already holds the optimizer.
        """
        self._engine.step()

    def partitions(self) -> list[Partition]:
        """The fp32 weights as the optimizer sees them."""
        if self.zero_stage == 0:
            return [
                Partition(p, [ParamRange(n, p.shape, 0)], None, p.numel())
                for p, n in self._names.items()
            ]

        if self.zero_stage < 3:
            flats = self._zero.single_partition_of_fp32_groups
            groups = self._zero.bit16_groups
        else:
            flats = self._zero.fp32_partitioned_groups_flat
            groups = self._zero.fp16_groups
        return [
            Partition(f, self._param_ranges(group), self._group, len(f))
            for f, group in zip(flats, groups, strict=True)
        ]

    def _param_ranges(self, parameters: list[Any]) -> list[ParamRange]:
        """Locate a group's parameters: contiguous in the buffer, at stage 3 split over its rows."""
        ranges = []
        offset = 0
        for p in parameters:
            shape, shard_numel = (
                (p.ds_shape, p.partition_numel()) if self.zero_stage == 3 else (p.shape, None)
            )
            ranges.append(ParamRange(self._names[p], shape, offset, shard_numel))
            offset += shape.numel() if shard_numel is None else shard_numel

        return ranges

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Copy the fp32 partitions, after they were loaded, to the weights of the module."""
        if self.zero_stage in (1, 2):
            self._zero.update_lp_params()
        elif self.zero_stage == 3:
            self._zero._partition_all_parameters()  # the next forward gathers them anew
            # the optimizer's fp32 shards, then the shards from which forward passes gather
            for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                self._zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
                self._zero._unflatten_partitioned_parameters(number)
