"""The example of an optimizer in docs/how-to.md: registered, it works like the others."""

from pathlib import Path

import pytest
import torch

from bitlm_dist.registry import OPTIMIZERS
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizer import Optimizer, is_inner_matrix, learning_rates
from bitlm_dist.training.partitioners.replicated import ReplicatedPartitioner

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setitem(OPTIMIZERS, "lion", "experiments.optimizers.lion:Lion")
    settings = OptimizerConfig(adamw_lr=0.01, weight_decay=0.1, max_grad_norm=0, ema=0.9)
    return settings.model_copy(update={"matrix_optimizer": "lion"})


def test_lion_follows_its_formula_and_skips_what_is_not_finite(config, seed):
    name = "backbone.layers.0.weight"
    parameter = torch.nn.Parameter(torch.randn(8, 4))
    optimizer = Optimizer(config, [ReplicatedPartitioner({name: parameter})])
    weight = parameter.detach().double()
    average = torch.zeros_like(weight)
    first, second = config.betas

    for step in range(5):
        grad = torch.randn(8, 4)
        # a step in between that must not count
        if step == 2:
            parameter.grad = torch.full_like(grad, float("inf"))
            assert not optimizer.clip_and_step(1.0)[1]

        parameter.grad = grad
        assert optimizer.clip_and_step(1.0)[1]
        direction = (first * average + (1 - first) * grad).sign()
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * direction
        average = second * average + (1 - second) * grad

    state = {n: tensor.full for n, tensor in optimizer.state_dict().items()}
    assert state.keys() == {f"{name}.exp_avg", f"{name}.ema"}
    torch.testing.assert_close(parameter.detach().double(), weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(state[f"{name}.exp_avg"].double(), average, rtol=0, atol=1e-6)


def test_lion_takes_the_inner_matrices_and_adamw_the_rest(config, tiny_model):
    named = dict(tiny_model().named_parameters())
    optimizer = Optimizer(config, [ReplicatedPartitioner(named)])
    slots = {n.rpartition(".") for n in optimizer.state_dict()}
    for name, parameter in named.items():
        found = {slot for owner, _, slot in slots if owner == name}
        others = set() if is_inner_matrix(name, parameter) else {"exp_avg_sq", "step"}
        assert found == {"exp_avg", "ema"} | others
    assert learning_rates(config, 0.5) == {"lr_adamw": 0.005, "lr_lion": 0.005}
