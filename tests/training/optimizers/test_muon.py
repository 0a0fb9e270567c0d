import pytest
import torch

from bitlm_dist.parallel.partition import ParamRange, Partition
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizers.muon import Muon, orthogonalize

APPLIED = torch.tensor(True)


def partitions_of(tensors, rule):
    """One partition per tensor, with its initial state."""
    return [
        Partition(
            tensor.clone(),
            [ParamRange(str(i), tensor.shape, [slice(0, tensor.numel())])],
            state=rule.init_state(tensor),
        )
        for i, tensor in enumerate(tensors)
    ]


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape, seed):
    # Five iterations raise a small singular value by a factor of about 3.4^5, so the smallest one
    # must not be close to zero.
    u, _, v = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    matrix = u @ torch.diag(torch.rand(8, dtype=torch.float64) * 0.9 + 0.1) @ v
    out = orthogonalize(matrix.unsqueeze(0))[0]
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.4
    assert values.max() < 1.3

    inner = u.T @ out @ v.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-4)


def test_muon_equals_torch_muon_up_to_its_bfloat16(seed):
    start = [torch.randn(*shape) * 0.1 for shape in ((16, 16), (32, 16), (16, 32), (16, 16))]
    rule = Muon(OptimizerConfig(muon_momentum=0.95))
    ours = partitions_of(start, rule)
    theirs = [torch.nn.Parameter(x.clone()) for x in start]
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)

    for step in range(5):
        torch.manual_seed(step)
        grads = [torch.randn_like(x) for x in start]
        for partition, parameter, grad in zip(ours, theirs, grads, strict=True):
            partition.flat.grad = grad.clone()
            parameter.grad = grad.clone()
        rule.update(ours, 0.02, 0.1, APPLIED)
        reference.step()

    for a, b, x in zip(ours, theirs, start, strict=True):
        moved = (b - x).norm()
        assert (a.flat - b).norm() < 0.02 * moved


def test_a_stack_of_matrices_is_updated_like_separate_ones(seed):
    start = torch.randn(4, 24, 8)
    rule = Muon(OptimizerConfig())
    (stack,) = partitions_of([start], rule)
    matrices = partitions_of([*start], rule)

    for _ in range(3):
        grad = torch.randn_like(start)
        stack.flat.grad = grad.clone()
        for partition, part in zip(matrices, grad, strict=True):
            partition.flat.grad = part
        rule.update([stack], 0.02, 0.1, APPLIED)
        rule.update(matrices, 0.02, 0.1, APPLIED)

    assert torch.equal(stack.flat, torch.stack([partition.flat for partition in matrices]))
    assert not torch.equal(stack.flat, start)


def test_a_step_that_is_not_applied_changes_nothing(seed):
    start = [torch.randn(16, 8), torch.randn(2, 8, 8)]
    rule = Muon(OptimizerConfig())
    partitions = partitions_of(start, rule)

    for partition in partitions:
        partition.flat.grad = torch.full_like(partition.flat, float("nan"))
    rule.update(partitions, 0.02, 0.1, ~APPLIED)
    for partition, x in zip(partitions, start, strict=True):
        assert torch.equal(partition.flat, x)
        assert not partition.state["momentum_buffer"].any()
