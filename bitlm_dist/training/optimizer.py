"""Muon for the matrices of backbone layers and head blocks, AdamW for the rest; one schedule scales both."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bitlm_dist.config import OptimizerConfig
from bitlm_dist.training.muon import Muon


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may take a parameter: a matrix of a backbone layer or of a head block."""
    return parameter.dim() == 2 and (".layers." in name or name.startswith(("head.blocks.", "head.ahead.")))


class Optimizers:
    """The optimizers of a model behind one step.

    Args:
        model: its named parameters are split between Muon and AdamW.
        config: learning rates are peaks; :meth:`step` takes the schedule's factor.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.clip_norm = config.clip_norm
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        muon = {n for n, p in self._named.items() if config.matrices == "muon" and is_inner_matrix(n, p)}
        decayed = [p for n, p in self._named.items() if n not in muon and p.dim() >= 2]
        plain = [p for n, p in self._named.items() if n not in muon and p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        ]
        if muon:
            self._optimizers.append(
                Muon(
                    [p for n, p in self._named.items() if n in muon],
                    lr=config.muon_lr,
                    momentum=config.muon_momentum,
                    weight_decay=config.weight_decay,
                    nesterov=True,
                )
            )
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]

    def step(self, factor: float) -> tuple[float, bool]:
        """Clip the joint gradient norm and update with learning rates of ``factor`` times their peaks.

        Returns:
            The norm before clipping, and whether the update was made: a norm that is not finite skips it.
        """
        norm = float(nn.utils.clip_grad_norm_(self._named.values(), self.clip_norm or math.inf))
        finite = math.isfinite(norm)
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def _slots(self) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer]]:
        names = {id(p): n for n, p in self._named.items()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield names[id(parameter)], parameter, optimizer

    def state(self) -> dict[str, Tensor]:
        """Optimizer state by parameter name, ``NAME.SLOT``; the tensors themselves, so loading into them restores it."""
        found = {}
        for name, parameter, optimizer in self._slots():
            if parameter not in optimizer.state:
                self._fill(parameter, optimizer)
            for slot, value in optimizer.state[parameter].items():
                found[f"{name}.{slot}"] = value
        return found

    @staticmethod
    def _fill(parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """The state that the first step would create, so that there is something to load into."""
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        else:
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


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
