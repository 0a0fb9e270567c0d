"""Muon for the matrices of backbone layers and head blocks, AdamW for the rest; one schedule scales both."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitlm_dist.config import OptimizerConfig
from bitlm_dist.model.initialization import split_dimension
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ALONE, Layout
from bitlm_dist.parallel.sliced import Sliced
from bitlm_dist.training import fused_adam
from bitlm_dist.training.muon import Muon

MASTER, AVERAGE = "master", "ema"


class Averages:
    """Exponential moving averages of fp32 weights, by name; none where ``decay`` is 0.

    Args:
        decay: of every update; ``optimizer.ema``.
        weights: what is averaged, as it stands now.
    """

    def __init__(self, decay: float, weights: Mapping[str, Tensor]) -> None:
        self._decay = decay
        self.by_name = {n: t.detach().clone() for n, t in weights.items()} if decay else {}

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after an update."""
        if self.by_name:
            torch._foreach_lerp_([*self.by_name.values()], [weights[n].detach() for n in self.by_name], 1 - self._decay)


def _owners(named: Mapping[str, nn.Parameter], ranks: int) -> dict[str, int]:
    """Which of ``ranks`` updates each tensor: the largest first, each to the rank with least so far."""
    load, owners = [0] * ranks, {}
    for name, parameter in sorted(named.items(), key=lambda item: (-item[1].numel(), item[0])):
        owners[name] = load.index(min(load))
        load[owners[name]] += parameter.numel()
    return owners


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    grad = getattr(parameter, "main_grad", parameter.grad)
    return None if grad is None else grad.float()


def sum_of_squares(grads: Sequence[tuple[str, Tensor]], layout: Layout) -> Tensor:
    """What this rank adds to the squared norm of the whole gradient; of a tensor that all tensor ranks hold, one counts it."""
    counted = [grad for name, grad in grads if layout.tensor_rank == 0 or split_dimension(name) is not None]
    return torch.stack(torch._foreach_norm(counted)).square().sum() if counted else torch.zeros((), device=mesh.device())


def clip_scale(norm: float, most: float) -> float:
    """What a gradient is multiplied with so that its norm is at most ``most``; 0: never clipped."""
    return min(1.0, (most or math.inf) / (norm + 1e-6))


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may take a parameter: a matrix of a backbone layer or of a head block."""
    return parameter.dim() == 2 and (".layers." in name or name.startswith(("head.blocks.", "head.ahead.")))


def rule_of(config: OptimizerConfig, name: str, parameter: Tensor) -> tuple[float, float]:
    """A tensor's learning rates as a share of the config's, and its weight decay: vectors have none."""
    part = name.partition(".")[0]
    component = {"backbone": config.backbone, "embedding": config.input}.get(part, config.head)
    decay = config.weight_decay if component.weight_decay is None else component.weight_decay
    return component.lr_scale, decay if parameter.dim() >= 2 else 0.0


def groups_of(named: Mapping[str, Tensor], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups of one optimizer (``muon``) and one rule each: ``names``, ``params``, peak ``lr``, ``weight_decay``."""
    groups: dict[tuple[bool, float, float], list[str]] = defaultdict(list)
    for name, parameter in named.items():
        muon = config.matrices == "muon" and is_inner_matrix(name, parameter)
        groups[muon, *rule_of(config, name, parameter)].append(name)
    return [
        {
            "muon": muon,
            "names": names,
            "params": [named[name] for name in names],
            "lr": (config.muon_lr if muon else config.lr) * scale,
            "weight_decay": decay,
        }
        for (muon, scale, decay), names in groups.items()
    ]


class Part(Protocol):
    """The optimizer of some of the model's tensors: what :func:`step_together` needs of it, once a step and in this order."""

    def squares(self) -> float:
        """Squared norm of the whole gradient of its tensors over all ranks; every process calls it and learns it."""
        ...

    def update(self, scale: float, factor: float) -> None:
        """Update by gradients times ``scale``, with learning rates of ``factor`` times their peaks."""
        ...

    def clear(self) -> None:
        """Forget the gradients."""
        ...


def step_together(parts: Sequence[Part], clip_norm: float, factor: float) -> tuple[float, bool]:
    """Clip the joint gradient norm of all parts and update each.

    Returns:
        The norm before clipping, and whether the update was made: a norm that is not finite skips it for all parts on all ranks.
    """
    norm = math.sqrt(sum(part.squares() for part in parts))
    finite = math.isfinite(norm)
    for part in parts:
        if finite:
            part.update(clip_scale(norm, clip_norm), factor)
        part.clear()
    return norm, finite


class Optimizers:
    """The optimizers of this process's stages behind one step.

    With ``optimizer.sharded`` every data-parallel rank keeps the state of some tensors, updates these and sends them to the others;
    Muon always orthogonalises whole matrices, whatever the tensor-parallel ranks hold of them.

    Args:
        named: the trainable tensors of this process by their names in the whole model. Gradients are read from ``main_grad``, where
            Megatron's data parallelism puts them, else from ``grad``.
        config: learning rates are peaks; :meth:`step` takes the schedule's factor.
        layout: of the job.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimizerConfig, layout: Layout = ALONE) -> None:
        self.clip_norm, self.layout = config.clip_norm, layout
        self._named = dict(named)
        self._owners = _owners(self._named, layout.replicas if config.sharded else 1)
        own: dict[str, Tensor] = {
            n: p for n, p in self._named.items() if self._owners[n] == (layout.replica_rank if config.sharded else 0)
        }
        # of weights in bf16 an fp32 copy is what is updated: small updates would be rounded away
        self._masters = {n: p.detach().float() for n, p in own.items() if p.dtype != torch.float32}
        own |= self._masters
        groups = groups_of(own, config)
        adamw, muon = ([group for group in groups if group["muon"] == wanted] for wanted in (False, True))
        self._optimizers: list[torch.optim.Optimizer] = []
        if adamw:
            self._optimizers.append(fused_adam.find(config.fused)[1](adamw, lr=config.lr, betas=config.betas, eps=config.eps))
        if muon:
            self._optimizers.append(Muon(muon, layout, momentum=config.muon_momentum, nesterov=True))
        self._own = own
        self._averages = Averages(config.ema, own)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]

    def step(self, factor: float) -> tuple[float, bool]:
        """:func:`step_together` with no other part."""
        return step_together([self], self.clip_norm, factor)

    def squares(self) -> float:
        """See :class:`Part`."""
        squares = sum_of_squares([(n, grad) for n, p in self._named.items() if (grad := _gradient(p)) is not None], self.layout)
        return float(mesh.sum_over_model(squares, self.layout))

    def update(self, scale: float, factor: float) -> None:
        """See :class:`Part`."""
        for name, updated in self._own.items():
            grad = _gradient(self._named[name])
            updated.grad = None if grad is None else grad.mul_(scale)
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
        self._averages.follow(self._own)
        self._round()
        self._share()

    def clear(self) -> None:
        """See :class:`Part`."""
        for parameter in (*self._named.values(), *self._masters.values()):
            parameter.grad = None

    @torch.no_grad()
    def _round(self) -> None:
        """The weights that the model computes with, from those that were updated."""
        for name, master in self._masters.items():
            self._named[name].copy_(master)

    @torch.no_grad()
    def _share(self) -> None:
        """Send every rank what the others have updated."""
        if len(set(self._owners.values())) <= 1:
            return
        ranks = torch.distributed.get_process_group_ranks(mesh.data_group())
        for place, rank in enumerate(ranks):
            tensors = [p for n, p in self._named.items() if self._owners[n] == place]
            if tensors:
                flat = torch.cat([tensor.flatten() for tensor in tensors])
                torch.distributed.broadcast(flat, rank, group=mesh.data_group())
                for tensor, new in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                    tensor.copy_(new.view_as(tensor))

    def _tensors(self) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer, dict[str, Any]]]:
        """Every tensor that this rank updates, with its optimizer and parameter group."""
        names = {id(p): n for n, p in self._own.items()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield names[id(parameter)], parameter, optimizer, group

    def state(self) -> dict[str, Sliced]:
        """Optimizer state by parameter name, ``NAME.SLOT``, to be saved, or to be loaded into and given to :meth:`restore`.

        Of weights in bf16 the slot ``master`` holds the fp32 copy; ``ema`` is the moving average, where one is kept.
        """
        found = {f"{name}.{MASTER}": master for name, master in self._masters.items()}
        found |= {f"{name}.{AVERAGE}": average for name, average in self._averages.by_name.items()}
        for name, parameter, optimizer, group in self._tensors():
            if isinstance(optimizer, Muon):
                slots = {"momentum_buffer": optimizer.momentum_of(parameter)}
            else:
                slots = fused_adam.fill(optimizer, parameter, group)
            found |= {f"{name}.{slot}": value for slot, value in slots.items()}
        return {name: Sliced.whole(tensor) for name, tensor in found.items()}

    def restore(self, state: Mapping[str, Sliced]) -> None:
        """Take over what was loaded into :meth:`state`'s tensors: all but step counts are the optimizers' own."""
        for name, parameter, optimizer, group in self._tensors():
            if not isinstance(optimizer, Muon):
                fused_adam.set_step(optimizer, parameter, group, state[f"{name}.step"].tensor)


def schedule_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of update ``step`` (0-based) of ``steps`` as a share of the peak: linear warm-up, then the decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.final_lr + (1 - config.final_lr) * max(0.0, shape)
