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
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.compilation import no_torch_compile
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.model.head_loss import HeadBatch
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.partition import ParamRange, Partition
from bitlm_dist.training.partitioners.base import HeadPartitioner, Update

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

    # the joint norm decides whether a step is skipped; DeepSpeed's own check would wait for the GPU
    if head.zero_stage in (1, 2) and head.offload == "none":
        zero["compute_grad_norm"] = False

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
        "bf16": {"enabled": config.training.precision != "fp32", "check_grad_overflow": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


class _PartitionOptimizer(torch.optim.Optimizer):
    """The optimizer that DeepSpeed is given: it leaves updates to a function.

    DeepSpeed replaces the parameters by its flat partitions, and steps them one by one.
    """

    def __init__(self, groups: Iterable[list[nn.Parameter]]) -> None:
        super().__init__([{"params": group} for group in groups], {"lr": 0.0})
        self.partitions: Sequence[Partition] = ()
        self.update: Update = lambda partitions: None

    @override
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        flats = {id(flat) for group in self.param_groups for flat in group["params"]}
        self.update([p for p in self.partitions if id(p.flat) in flats])


class DeepSpeedPartitioner(HeadPartitioner):
    """Partitions are ZeRO's flat buffers, one per parameter group; at stage 0, full tensors.

    Args:
        config: the checked config.
        module: the module with the head's parameters; its forward returns this rank's part of the
            loss.
        layout: the job's parallel layout.
        group_key: tells by name and parameter what may share a partition: equal keys.
    """

    def __init__(
        self,
        config: Config,
        module: nn.Module,
        layout: ParallelLayout,
        group_key: Callable[[str, Tensor], Hashable],
    ) -> None:
        super().__init__(layout)
        self._group = mesh.head_group()
        self.zero_stage = config.parallel.head.zero_stage
        self._num_ranks = dist.get_world_size(self._group)
        self._names: dict[Any, str] = {p: n for n, p in module.named_parameters()}
        weight_dtype = next(module.parameters()).dtype

        groups: dict[Hashable, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in module.named_parameters():
            groups[group_key(name, parameter)].append(parameter)
        self._optimizer = _PartitionOptimizer(groups.values())

        self._engine, _, _, _ = _load_deepspeed(self._group).initialize(
            model=module,
            optimizer=self._optimizer,
            config=_deepspeed_config(
                config, mesh.device().type == "cuda", sum(p.numel() for p in self._names)
            ),
            mpu=_Mpu(self._group),
            dist_init_required=False,
        )
        self._zero: Any = self._engine.optimizer
        self.partitions = self._build_partitions(weight_dtype)
        self._optimizer.partitions = self.partitions

    @staticmethod
    @override
    def check_installed() -> None:
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

    def _build_partitions(self, weight_dtype: torch.dtype) -> list[Partition]:
        if self.zero_stage == 0:
            return [
                Partition(p, [ParamRange(n, p.shape, [slice(0, p.numel())])], weight_dtype)
                for p, n in self._names.items()
            ]

        if self.zero_stage < 3:
            flats = self._zero.single_partition_of_fp32_groups
            groups = self._zero.bit16_groups
        else:
            flats = self._zero.fp32_partitioned_groups_flat
            groups = self._zero.fp16_groups
        return [
            Partition(flat, self._param_ranges(group, len(flat)), weight_dtype, self._group)
            for flat, group in zip(flats, groups, strict=True)
        ]

    def _param_ranges(self, parameters: list[Any], row_numel: int) -> list[ParamRange]:
        """Locate a group's parameters: contiguous in the buffer, at stage 3 split over its rows."""
        ranges = []
        offset = 0
        for p in parameters:
            name = self._names[p]
            if self.zero_stage == 3:
                numel = p.partition_numel()
                ranges.append(ParamRange.split(name, p.ds_shape, offset, self._num_ranks, numel))
            else:
                numel = p.numel()
                ranges.append(
                    ParamRange.contiguous(name, p.shape, offset, self._num_ranks, row_numel)
                )
            offset += numel

        return ranges

    @override
    def __call__(self, batch: HeadBatch) -> tuple[Tensor, Tensor]:
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

    @override
    def start_microbatch(self, is_last: bool) -> None:
        # the step's last one completes the reduction
        self._engine.set_gradient_accumulation_boundary(is_last)

    @override
    def reduce_grads(self) -> None:
        # stages 1 to 3 reduce during the backward pass
        if self.zero_stage == 0:
            self._engine.allreduce_gradients()

    @override
    def grad_norm(self) -> Tensor:
        if self.zero_stage == 0:
            grads = [p.grad for p in self._names if p.grad is not None]
            return torch.stack(torch._foreach_norm(grads)).norm()

        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm: Tensor = (
            combine_grad_norm_groups(self._zero._get_norm_groups())
            if self.zero_stage == 3
            else self._zero.scaled_global_norm()
        )
        return norm

    @override
    def step(self, update: Update) -> None:
        # DeepSpeed calls the optimizer, all-gathers the weights, and drops the gradients
        self._optimizer.update = update
        self._engine.step()

    @override
    @torch.no_grad()
    def sync_model_weights(self) -> None:
        if self.zero_stage in (1, 2):
            self._zero.update_lp_params()
        elif self.zero_stage == 3:
            self._zero._partition_all_parameters()  # the next forward gathers them anew
            # the optimizer's fp32 shards, then the shards from which forward passes gather
            for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                self._zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
                self._zero._unflatten_partitioned_parameters(number)


def _load_deepspeed(group: dist.ProcessGroup) -> Any:
    """Import DeepSpeed and confine it to ``group``."""
    local_device = mesh.device()
    if local_device.type == "cpu":
        # otherwise every rank logs that it found no accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        # DeepSpeed takes this for the index of its GPU among the visible ones
        os.environ["LOCAL_RANK"] = str(local_device.index)

    with no_torch_compile():
        import deepspeed

        # DeepSpeed loads this later and outside this context; it is unused here
        import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.ops
    from deepspeed.comm import comm

    # it warns that the optimizer is not one of its own
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # No compiled op is used. DeepSpeed would try all of them, with warnings, and compile one for
    # minutes.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    comm.cdb = _group_backend(group)
    return deepspeed
