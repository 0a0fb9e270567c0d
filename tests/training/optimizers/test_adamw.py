import pytest
import torch

from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizer import Optimizer
from bitlm_dist.training.partitioners.replicated import ReplicatedPartitioner

CONFIG = OptimizerConfig(matrix_optimizer="adamw", weight_decay=0.1, adamw_lr=1e-2, max_grad_norm=0)


def build(values):
    named = {n: torch.nn.Parameter(x.clone()) for n, x in values.items()}
    return named, Optimizer(CONFIG, [ReplicatedPartitioner(named)])


def take(named, optimizer, steps):
    for grad in steps:
        for name, parameter in named.items():
            parameter.grad = grad[name].clone()
        optimizer.clip_and_step(1.0)


def by_formula(start, grads):
    """Weights after AdamW's updates in fp64 (Loshchilov & Hutter, 2019)."""
    first, second = CONFIG.betas
    weights = {}
    for name, x in start.items():
        weight = x.double()
        mean = torch.zeros_like(weight)
        square = torch.zeros_like(weight)
        decay = CONFIG.weight_decay if x.dim() > 1 else 0.0
        for step, grad in enumerate(grads, 1):
            mean = first * mean + (1 - first) * grad[name].double()
            square = second * square + (1 - second) * grad[name].double() ** 2
            scale = (square / (1 - second**step)).sqrt() + CONFIG.eps
            weight = weight * (1 - CONFIG.adamw_lr * decay)
            weight = weight - CONFIG.adamw_lr * mean / (1 - first**step) / scale
        weights[name] = weight
    return weights


@pytest.mark.parametrize("skipped", [False, True])
def test_updates_follow_the_formula_across_a_resume_and_a_skipped_step(skipped, seed):
    start = {"a": torch.randn(6, 5), "b": torch.randn(7)}
    grads = [{n: torch.randn_like(x) for n, x in start.items()} for _ in range(6)]
    named, optimizer = build(start)
    take(named, optimizer, grads[:3])
    if skipped:
        take(named, optimizer, [{n: x / 0 for n, x in grads[0].items()}])

    state = optimizer.state_dict()
    resumed, again = build({n: p.detach() for n, p in named.items()})
    again.load_state_dict(state)
    take(resumed, again, grads[3:])

    expected = by_formula(start, grads)
    for name, parameter in resumed.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=0, atol=1e-6)
    assert again.state_dict()["a.step"].full == 6
