"""The head under DeepSpeed's ZeRO, while Megatron-core drives the backbone in the same process and step.

Only the ranks of the last stage come here. DeepSpeed takes its data-parallel group to be all of them: tensor-, context- and
data-parallel ranks, for each denoises blocks of its own. It shards, gathers and reduces; what is updated how is up to the
optimizer that it is given, which sees flat fp32 partitions.

DeepSpeed is written for one engine that owns the job. Three things here keep it inside its group: an ``mpu`` that names the group,
a backend object in which "no group" means that group (barriers and broadcasts in it name none), and no compiled op.

Legend: G ranks of the head, L numbers of a rank's flat partition.
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
from bitlm_dist.parallel.partition import Partition, Piece

TESTED = ("0.19.8",)  # versions of DeepSpeed: private names are used here
# collectives whose group DeepSpeed gives by name
CALLED_BY_NAME = (
    *("broadcast", "broadcast_object_list", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_gather_coalesced"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "gather", "scatter", "barrier", "monitored_barrier"),
    *("all_reduce_coalesced", "all_to_all", "all_to_all_single"),
)
LARGEST_BUCKET = 5 * 10**8  # numbers; DeepSpeed's own default
PERSISTENT = 4096  # ZeRO-3 does not split smaller tensors' gathers: they stay whole on every rank


def check_deepspeed() -> None:
    """Raise :class:`UserError` where DeepSpeed is missing or of a version that was not tested."""
    tested, other = " or ".join(TESTED), "or set head.engine = fsdp2 or replicated"
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"head.engine = deepspeed: DeepSpeed is not installed: install {tested}, {other}") from None
    if found.partition("+")[0] not in TESTED:
        raise UserError(f"head.engine = deepspeed: DeepSpeed {found} is installed, tested is {tested}: install that, {other}")


def _backend(group: dist.ProcessGroup) -> Any:
    """DeepSpeed's way to torch.distributed, in which the world is ``group`` and its ranks are numbered within."""
    from deepspeed.comm.torch import TorchBackend

    ranks = dist.get_process_group_ranks(group)

    def inside(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **named: Any) -> Any:
            if named.get("group") in (None, dist.group.WORLD):
                named["group"] = group
                for end in ("src", "dst"):
                    if named.get(end) is not None:
                        named[end] = ranks[named[end]]
            return method(self, *args, **named)

        return call

    def new_group(self: Any, wanted: Any) -> dist.ProcessGroup:
        assert list(wanted) == list(range(len(ranks))), f"DeepSpeed asks for a group {list(wanted)} inside the head's"
        return group

    def all_reduce(self: Any, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        return plain_all_reduce(self, tensor, op=op, group=group, async_op=async_op)

    def inference_all_reduce(self: Any, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        return all_reduce(self, tensor, op, group)

    plain_all_reduce = inside(TorchBackend.all_reduce)
    plain_rank, plain_size = inside(TorchBackend.get_rank), inside(TorchBackend.get_world_size)
    methods: dict[str, Any] = {name: inside(getattr(TorchBackend, name)) for name in CALLED_BY_NAME}
    methods |= {"new_group": new_group, "all_reduce": all_reduce, "inference_all_reduce": inference_all_reduce}
    methods |= {
        "get_rank": lambda self, group=None: plain_rank(self, group=group),
        "get_world_size": lambda self, group=None: plain_size(self, group=group),
    }
    kind = type("HeadBackend", (TorchBackend,), methods)
    return kind(dist.get_backend(group), None, None)


class _Mpu:
    """What DeepSpeed asks a model-parallel unit: here none of its kind is parallel but data."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The head's ranks."""
        return self._group

    def get_data_parallel_rank(self) -> int:
        """Place among them."""
        return dist.get_rank(self._group)

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self._group)

    def get_model_parallel_group(self) -> None:
        """None."""

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.scale, None


def _settings(config: Config, cuda: bool, numbers: int) -> dict[str, Any]:
    """DeepSpeed's own config. Accumulation, clipping and schedule are not its business here.

    Args:
        config: checked.
        cuda: whether the head computes on a GPU.
        numbers: of the head's weights. DeepSpeed's buckets, half a billion numbers by default, need not be larger.
    """
    head = config.head
    zero: dict[str, Any] = {"stage": head.zero_stage, "overlap_comm": cuda and head.zero_stage > 0}
    bucket = min(numbers + numbers % 2, LARGEST_BUCKET)  # an odd one is refused
    zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if head.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT
    if head.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if head.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # a step's boundary is set by hand
        "gradient_clipping": 0.0,  # the default, 1.0, would clip the head alone
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's needs nothing compiled
        "zero_optimization": zero,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


class ZeroHead:
    """A module under ZeRO over the head's ranks; see :class:`~bitlm_dist.training.sharded_head.HeadEngine`.

    Args:
        config: checked.
        module: with the head's parameters; its forward returns this rank's share of the loss.
        optimizer: DeepSpeed makes it update flat partitions; it finds the tensors in them through :meth:`partitions`.
    """

    def __init__(self, config: Config, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        own = mesh.device()
        if own.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or every rank says that it found no other
        else:
            os.environ["LOCAL_RANK"] = str(own.index)  # DeepSpeed's number of the GPU, whichever of the node's GPUs are visible
        with no_torch_compile():
            import deepspeed
            import deepspeed.runtime.zero.muon.muon_optimizer  # DeepSpeed loads its Muon unasked; ours is another
        import deepspeed.ops
        from deepspeed.comm import comm

        group = mesh.head_group()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns that the optimizer is none of its own
        # No compiled op is used. Asked for its ops, DeepSpeed would try each, with warnings, and compile one for minutes.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        comm.cdb = _backend(group)
        self.stage, self._ranks, self._group = config.head.zero_stage, dist.get_world_size(group), group
        self._names = {p: n for n, p in module.named_parameters()}
        self._engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_settings(config, own.type == "cuda", sum(p.numel() for p in self._names)),
            mpu=_Mpu(group),
            dist_init_required=False,
        )
        self._zero: Any = self._engine.optimizer

    def __call__(self, context: Tensor, states: Tensor, *rest: Any) -> Tensor:
        """Forward of the module.

        DeepSpeed averages gradients over the head's ranks. Each rank has a share of one loss, so they are to be added up: the loss
        counts G times for the head, and as it is for what came before it.
        """
        context, states = (_ScaleGradient.apply(x, 1 / self._ranks) for x in (context, states))
        # at stage 0 DeepSpeed wants to call the backward pass itself; there it has nothing to do before :meth:`reduce`
        forward = self._engine.module if self.stage == 0 else self._engine
        loss: Tensor = forward(context, states, *rest)
        scaled: Tensor = _ScaleGradient.apply(loss, float(self._ranks))
        return scaled

    def begin(self, last: bool) -> None:
        """The next forward and backward are of a microbatch, the step's last or not."""
        self._engine.set_gradient_accumulation_boundary(last)

    def reduce(self) -> None:
        """After the last backward: whatever of the gradients' sum the backward left undone."""
        if self.stage == 0:
            self._engine.allreduce_gradients()

    def norm(self) -> float:
        """Of the whole gradient of the head; NaN where it is not finite."""
        if self.stage == 0:
            return float(torch.stack(torch._foreach_norm([p.grad for p in self._names if p.grad is not None])).norm())
        from deepspeed.runtime.utils import combine_grad_norm_groups

        found = combine_grad_norm_groups(self._zero._get_norm_groups()) if self.stage == 3 else self._zero.scaled_global_norm()
        return float(found) if float(found) >= 0 else float("nan")  # DeepSpeed says -1

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer, which DeepSpeed has, update the partitions; send the weights round and forget the gradients."""
        self._engine.step()

    def partitions(self) -> list[Partition]:
        """The fp32 weights as the optimizer sees them."""
        if self.stage == 0:
            return [Partition(p, [Piece(n, p.shape, 0)], None, p.numel()) for p, n in self._names.items()]
        if self.stage < 3:
            flats, groups = self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups
        else:
            flats, groups = self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups
        return [Partition(f, self._pieces(group), self._group, len(f)) for f, group in zip(flats, groups, strict=True)]

    def _pieces(self, parameters: list[Any]) -> list[Piece]:
        """Tensors end to end in the table; at stage 3 each has a share of every row instead."""
        found, offset = [], 0
        for p in parameters:
            shape, share = (p.ds_shape, p.partition_numel()) if self.stage == 3 else (p.shape, None)
            found.append(Piece(self._names[p], shape, offset, share))
            offset += shape.numel() if share is None else share
        return found

    @torch.no_grad()
    def publish(self) -> None:
        """The fp32 partitions were changed from outside: bring the weights that the module computes with after them."""
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            self._zero._partition_all_parameters()  # the next forward gathers them anew
            for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                self._zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
                self._zero._unflatten_partitioned_parameters(number)
