"""Recomputed steps compute what kept ones do, and keep nothing but their inputs."""

import weakref

import torch

from bitlm_dist.model.recomputation import recomputed


def two_steps(x, weight, readout, recomputes):
    """Two nested steps; returns the loss and references to what a usual graph would keep."""

    def double_tanh(x):
        y = (x @ weight).tanh()
        return y, 2 * y

    if not recomputes:
        y, twice = double_tanh(x)
        return (y.transpose(0, 1) @ (twice.exp() @ readout)).sum(), ()

    with recomputed(double_tanh, x) as (y, twice):
        with recomputed(torch.exp, twice) as z:
            product = z @ readout
        loss = (y.transpose(0, 1) @ product).sum()
    return loss, [weakref.ref(tensor) for tensor in (y, twice, z)]


def test_gradients_equal_those_of_kept_outputs(seed):
    inputs = [torch.randn(5, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    loss, _ = two_steps(*inputs, recomputes=False)
    expected = torch.autograd.grad(loss, inputs)

    loss, kept = two_steps(*inputs, recomputes=True)
    assert all(reference() is None for reference in kept)
    loss.backward()
    for x, grad in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, grad, rtol=0, atol=0)


def test_the_function_runs_twice_and_without_gradients_once():
    runs = []

    def step(x):
        runs.append(torch.is_grad_enabled())
        return x.sin(), x.cos()

    x = torch.ones(3, requires_grad=True)
    with recomputed(step, x) as (sin, cos):
        product = sin * cos
    product.sum().backward()
    assert runs == [False, True]
    torch.testing.assert_close(x.grad, (2 * torch.ones(3)).cos())

    with torch.no_grad(), recomputed(step, x) as (sin, _):
        assert not sin.requires_grad
    assert len(runs) == 3
