"""Fused AdamW by a stand-in with the interface of Transformer Engine and NVIDIA apex.

Neither of them runs without a GPU. The stand-in counts steps per parameter group, as they do.
"""

import sys
import types
from unittest import mock

import pytest
import torch

from bitlm_dist.parallel import mesh
from bitlm_dist.training import fused_adam
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizer import Optimizers


class GroupCounting(torch.optim.Optimizer):
    """AdamW by its formula (Loshchilov & Hutter, 2019), with apex's arguments and step count."""

    def __init__(self, params, lr, betas, eps, weight_decay=0.0, adam_w_mode=False):
        assert adam_w_mode
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)

                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / scale)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(mesh, "device", lambda: torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.optimizers", None)

    def install(module):
        monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
        monkeypatch.setitem(sys.modules, "apex.optimizers", module)

    return install


def test_the_fastest_implementation_that_is_there_is_taken(on_gpu, monkeypatch):
    apex = types.ModuleType("apex.optimizers")
    engine = types.ModuleType("transformer_engine.pytorch.optimizers")
    on_gpu(apex)  # another project's apex: no FusedAdam
    assert fused_adam.select_adamw("auto")[0] == "torch"

    apex.FusedAdam = engine.FusedAdam = GroupCounting
    assert fused_adam.select_adamw("auto")[0] == "apex"
    assert fused_adam.select_adamw("torch")[0] == "torch"

    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(
        sys.modules, "transformer_engine.pytorch", types.ModuleType("transformer_engine.pytorch")
    )
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.optimizers", engine)

    assert fused_adam.select_adamw("auto")[0] == "transformer_engine"
    monkeypatch.setattr(mesh, "device", lambda: torch.device("cpu"))
    assert fused_adam.select_adamw("auto")[0] == "torch"


def test_one_that_was_built_for_another_cuda_is_left_out_and_said(on_gpu, monkeypatch, caplog):
    broken = mock.Mock(side_effect=OSError("libcudart.so.12: cannot open\n shared object file"))
    monkeypatch.setattr(fused_adam.importlib, "import_module", broken)
    assert fused_adam.select_adamw("auto")[0] == "torch"

    said = (
        "AdamW of transformer_engine is not used: "
        "OSError: libcudart.so.12: cannot open shared object file"
    )

    assert said in caplog.messages


def test_a_run_may_change_the_implementation_at_a_checkpoint(on_gpu, seed):
    """Two steps each with the stand-in, torch's and the stand-in again equal six with torch's.

    The state is saved and loaded at each change.
    """
    config = OptimizerConfig(matrix_optimizer="adamw", weight_decay=0.1, adamw_lr=1e-2)
    start = {"a": torch.randn(6, 5), "b": torch.randn(7)}
    grads = [{n: torch.randn_like(x) for n, x in start.items()} for _ in range(6)]

    def optimizers_of(values, choice):
        named = {n: torch.nn.Parameter(x.clone()) for n, x in values.items()}
        return named, Optimizers(named, config.model_copy(update={"fused": choice}))

    def take(named, optimizers, steps):
        for grad in steps:
            for name, parameter in named.items():
                parameter.grad = grad[name].clone()
            optimizers.clip_and_step(1.0)
        return named

    apex = types.ModuleType("apex.optimizers")
    apex.FusedAdam = GroupCounting
    on_gpu(apex)
    expected = take(*optimizers_of(start, "torch"), grads)
    values = start
    saved = None

    for number, choice in enumerate(("auto", "torch", "auto")):
        named, optimizers = optimizers_of(values, choice)
        if saved is not None:
            state = optimizers.state_dict()
            assert state.keys() == saved.keys()
            for name, tensor in state.items():
                tensor.full.copy_(saved[name])
            optimizers.load_state_dict(state)

        values = {
            n: p.detach().clone()
            for n, p in take(named, optimizers, grads[2 * number : 2 * number + 2]).items()
        }
        saved = {name: part.full.clone() for name, part in optimizers.state_dict().items()}

    for name, parameter in expected.items():
        torch.testing.assert_close(values[name], parameter.detach(), rtol=1e-4, atol=1e-5)
