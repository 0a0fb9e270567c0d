"""Muon for the matrices of backbone layers and head blocks, AdamW for the rest.

One schedule scales the learning rates of both.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitlm_dist.model.initialization import shard_dim
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ParallelLayout
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training import fused_adam
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.muon import Muon

MASTER_WEIGHT_SLOT = "master"
EMA_SLOT = "ema"


class EMA:
    """Exponential moving averages of fp32 weights, by name; none if ``decay`` is 0.

    Args:
        decay: Decay per update, ``optimizer.ema``.
        weights: The weights' current values, from which the averages start.
    """

    def __init__(self, decay: float, weights: Mapping[str, Tensor]) -> None:
        self._decay = decay
        self.by_name = {n: t.detach().clone() for n, t in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Update the averages from the current weights."""
        if self.by_name:
            torch._foreach_lerp_(
                [*self.by_name.values()],
                [weights[n].detach() for n in self.by_name],
                1 - self._decay,
            )


def _assign_owners(named: Mapping[str, nn.Parameter], num_ranks: int) -> dict[str, int]:
    """The rank, out of ``num_ranks``, that updates each tensor.

    The largest tensors are assigned first, each to the rank with the fewest elements so far.
    """
    numel_per_rank = [0] * num_ranks
    owners = {}
    # Ties are broken by name, as all ranks must arrive at the same assignment.
    for name, parameter in sorted(named.items(), key=lambda item: (-item[1].numel(), item[0])):
        owners[name] = numel_per_rank.index(min(numel_per_rank))
        numel_per_rank[owners[name]] += parameter.numel()
    return owners


def _fp32_grad(parameter: nn.Parameter) -> Tensor | None:
    # Megatron's data parallelism accumulates gradients in buffers of its own.
    grad = getattr(parameter, "main_grad", parameter.grad)
    return None if grad is None else grad.float()


def local_grad_norm_squared(grads: Sequence[tuple[str, Tensor]], layout: ParallelLayout) -> Tensor:
    """This rank's contribution to the squared norm of the full gradient.

    Args:
        grads: Gradients by the parameters' global names.
        layout: The job's parallel layout.
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


def clip_coefficient(grad_norm: float, max_grad_norm: float) -> float:
    """The factor that brings a gradient's norm down to ``max_grad_norm``; 0 there never clips."""
    return min(1.0, (max_grad_norm or math.inf) / (grad_norm + 1e-6))


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """True if Muon may update a parameter: a matrix of a backbone layer or of a head block."""
    return parameter.dim() == 2 and (
        ".layers." in name or name.startswith(("head.blocks.", "head.lookahead."))
    )


def param_group_options(
    config: OptimizerConfig, name: str, parameter: Tensor
) -> tuple[float, float]:
    """The learning rate scale and the weight decay of a tensor.

    Returns:
        The factor on the config's learning rates, and the weight decay: 0 for vectors and scalars.
    """
    part = name.partition(".")[0]
    component = {"backbone": config.backbone, "embedding": config.input}.get(part, config.head)

    decay = config.weight_decay if component.weight_decay is None else component.weight_decay
    return component.lr_scale, decay if parameter.dim() >= 2 else 0.0


def build_param_groups(
    named: Mapping[str, Tensor], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Group parameters by optimizer and options.

    Returns:
        Groups with the keys ``muon`` (True: for Muon, False: for AdamW), ``names``, ``params``,
        ``lr`` (the peak learning rate) and ``weight_decay``.
    """
    groups: dict[tuple[bool, float, float], list[str]] = defaultdict(list)
    for name, parameter in named.items():
        muon = config.matrix_optimizer == "muon" and is_inner_matrix(name, parameter)
        groups[muon, *param_group_options(config, name, parameter)].append(name)

    return [
        {
            "muon": muon,
            "names": names,
            "params": [named[name] for name in names],
            "lr": (config.muon_lr if muon else config.adamw_lr) * scale,
            "weight_decay": decay,
        }
        for (muon, scale, decay), names in groups.items()
    ]


class OptimizerPart(Protocol):
    """The optimizer of some of the model's tensors.

    :func:`clip_and_step` calls each method once per step, in this order.
    """

    def grad_norm_squared(self) -> float:
        """Squared norm of the full gradient of its tensors over all ranks. Collective."""
        ...

    def step(self, grad_scale: float, lr_multiplier: float) -> None:
        """Update the weights.

        Args:
            grad_scale: Factor on the gradients.
            lr_multiplier: Factor on the peak learning rates.
        """
        ...

    def zero_grad(self) -> None:
        """Drop the gradients."""
        ...


def clip_and_step(
    parts: Sequence[OptimizerPart], max_grad_norm: float, lr_multiplier: float
) -> tuple[float, bool]:
    """Clip the joint gradient norm of all parts and update each. Collective.

    Returns:
        The norm before clipping, and whether the update was applied: if the norm is not finite, all
        parts skip it on all ranks.
    """
    grad_norm = math.sqrt(sum(part.grad_norm_squared() for part in parts))
    is_finite = math.isfinite(grad_norm)

    for part in parts:
        if is_finite:
            part.step(clip_coefficient(grad_norm, max_grad_norm), lr_multiplier)
        part.zero_grad()
    return grad_norm, is_finite


class Optimizers:
    """The optimizers of this rank's pipeline stages, as one.

    With ``optimizer.sharded``, every data-parallel rank keeps the optimizer state of some tensors,
    updates these, and broadcasts them to the others (as in ZeRO-1, but with whole tensors). Muon
    always orthogonalises full matrices, whatever the tensor-parallel ranks hold of them.

    Args:
        named: This rank's trainable tensors by their names in the full model. Gradients are read
            from ``main_grad``, where Megatron's data parallelism puts them, else from ``grad``.
        config: Learning rates are peaks; :meth:`clip_and_step` takes the schedule's multiplier.
        layout: The job's parallel layout.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        layout: ParallelLayout = SINGLE_PROCESS,
    ) -> None:
        self.max_grad_norm = config.max_grad_norm
        self.layout = layout
        self._named = dict(named)

        self._owners = _assign_owners(self._named, layout.num_replicas if config.sharded else 1)
        local_weights: dict[str, Tensor] = {
            n: p
            for n, p in self._named.items()
            if self._owners[n] == (layout.replica_rank if config.sharded else 0)
        }
        # Weights in bf16 are updated in an fp32 copy: small updates would be rounded away.
        self._master_weights = {
            n: p.detach().float() for n, p in local_weights.items() if p.dtype != torch.float32
        }
        local_weights |= self._master_weights

        groups = build_param_groups(local_weights, config)
        adamw, muon = (
            [group for group in groups if group["muon"] == wanted] for wanted in (False, True)
        )
        # An optimizer of torch refuses an empty list of parameters.
        self._optimizers: list[torch.optim.Optimizer] = []
        if adamw:
            self._optimizers.append(
                fused_adam.select_adamw(config.fused)[1](
                    adamw, lr=config.adamw_lr, betas=config.betas, eps=config.eps
                )
            )
        if muon:
            self._optimizers.append(
                Muon(muon, layout, momentum=config.muon_momentum, nesterov=True)
            )

        self._local_weights = local_weights
        self._ema = EMA(config.ema, local_weights)
        self._peak_lrs = [
            [group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers
        ]

    def clip_and_step(self, lr_multiplier: float) -> tuple[float, bool]:
        """Clip and step this part alone, see :func:`clip_and_step`."""
        return clip_and_step([self], self.max_grad_norm, lr_multiplier)

    def grad_norm_squared(self) -> float:
        """Squared norm of the full gradient over all ranks. Collective."""
        local = local_grad_norm_squared(
            [(n, grad) for n, p in self._named.items() if (grad := _fp32_grad(p)) is not None],
            self.layout,
        )
        return float(mesh.all_reduce_sum_over_model(local, self.layout))

    def step(self, grad_scale: float, lr_multiplier: float) -> None:
        """Update this rank's tensors and their averages, and send them to the replicas. Collective.

        Args:
            grad_scale: Factor on the gradients.
            lr_multiplier: Factor on the peak learning rates.
        """
        for name, updated in self._local_weights.items():
            grad = _fp32_grad(self._named[name])
            updated.grad = None if grad is None else grad.mul_(grad_scale)

        for optimizer, peaks in zip(self._optimizers, self._peak_lrs, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_multiplier
            optimizer.step()

        # The averages take the fp32 master weights, before these are rounded for the model.
        self._ema.update(self._local_weights)
        self._copy_master_weights_to_model()
        self._broadcast_updated_weights()

    def zero_grad(self) -> None:
        """Drop the gradients of the model and of the master weights."""
        for parameter in (*self._named.values(), *self._master_weights.values()):
            parameter.grad = None

    @torch.no_grad()
    def _copy_master_weights_to_model(self) -> None:
        """Round the updated master weights to the dtype that the model computes in."""
        for name, master in self._master_weights.items():
            self._named[name].copy_(master)

    @torch.no_grad()
    def _broadcast_updated_weights(self) -> None:
        """Broadcast the tensors that each rank has updated to its replicas. Collective."""
        if len(set(self._owners.values())) <= 1:
            return

        ranks = torch.distributed.get_process_group_ranks(mesh.replica_group())
        for owner, rank in enumerate(ranks):
            tensors = [p for n, p in self._named.items() if self._owners[n] == owner]
            if tensors:
                # One broadcast per owner instead of one per tensor.
                flat = torch.cat([tensor.flatten() for tensor in tensors])
                torch.distributed.broadcast(flat, rank, group=mesh.replica_group())
                for tensor, new in zip(
                    tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
                ):
                    tensor.copy_(new.view_as(tensor))

    def _local_parameters(
        self,
    ) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer, dict[str, Any]]]:
        """Yield every tensor that this rank updates: name, tensor, optimizer, parameter group."""
        names = {id(p): n for n, p in self._local_weights.items()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield names[id(parameter)], parameter, optimizer, group

    def state_dict(self) -> dict[str, ShardedTensor]:
        """The optimizer state by ``NAME.SLOT``.

        The tensors share the optimizers' memory: save them, or load into them and pass them to
        :meth:`load_state_dict`. The slot ``master`` holds the fp32 copy of a weight in bf16,
        ``ema`` its moving average, if there is one.
        """
        tensors = {
            f"{name}.{MASTER_WEIGHT_SLOT}": master for name, master in self._master_weights.items()
        }
        tensors |= {f"{name}.{EMA_SLOT}": average for name, average in self._ema.by_name.items()}

        for name, parameter, optimizer, group in self._local_parameters():
            if isinstance(optimizer, Muon):
                slots = {"momentum_buffer": optimizer.get_or_init_momentum(parameter)}
            else:
                slots = fused_adam.get_or_init_state(optimizer, parameter, group)
            tensors |= {f"{name}.{slot}": value for slot, value in slots.items()}
        return {name: ShardedTensor.from_full(tensor) for name, tensor in tensors.items()}

    def load_state_dict(self, state_dict: Mapping[str, ShardedTensor]) -> None:
        """Finish loading a checkpoint into the tensors of :meth:`state_dict`.

        Only step counts are left to set: all other tensors are the optimizers' own memory.
        """
        for name, parameter, optimizer, group in self._local_parameters():
            if not isinstance(optimizer, Muon):
                fused_adam.set_step_count(
                    optimizer, parameter, group, state_dict[f"{name}.step"].full
                )


def learning_rates(config: OptimizerConfig, lr_multiplier: float) -> dict[str, float]:
    """The learning rates of a step, before the scales of single parts, by their metrics' names.

    Args:
        config: Peak learning rates.
        lr_multiplier: Factor of the schedule, see :func:`lr_multiplier_at`.
    """
    rates = {"lr_adamw": config.adamw_lr * lr_multiplier}
    if config.matrix_optimizer == "muon":
        rates["lr_muon"] = config.muon_lr * lr_multiplier
    return rates


def lr_multiplier_at(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The factor on peak learning rates at a step: linear warm-up, then the configured decay.

    Args:
        config: Schedule, warm-up and final factor.
        step: 0-based index of the update.
        num_steps: Updates of the whole run.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps

    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * max(0.0, decay)
