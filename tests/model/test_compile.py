"""Compiled regions match eager execution; a graph break inside one is an error (fullgraph)."""

import pytest
import torch
from torch._dynamo.utils import counters

from bitlm_dist.compilation import enable_compiled_regions
from bitlm_dist.model.batch import Batch

ON_GPU = torch.cuda.is_available()
INDUCTOR = "inductor" if ON_GPU else "aot_eager"  # its C++ takes more than a minute to compile

RECIPES = [
    (("--diffusion.num_noise_samples", "2", "--diffusion.context_dropout", "0.3"), INDUCTOR),
    (
        (
            "--preset",
            "paper",
            "--diffusion.loss",
            "elbo",
            "--diffusion.time_distribution",
            "logit_normal",
        ),
        "aot_eager",
    ),
]


def gradients(model, rows, step):
    tokens = torch.randint(2, 300, (rows, 32), generator=torch.Generator().manual_seed(step))
    batch = Batch(tokens, torch.zeros_like(tokens), torch.arange(rows)).to(
        next(model.parameters()).device
    )
    model.zero_grad()
    loss = model.loss(batch, seed=1, step=step)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "backend"), RECIPES)
def test_loss_and_gradients_are_those_of_the_code_as_written(recipe, backend, tiny_model, seed):
    model = tiny_model(*recipe).to("cuda" if ON_GPU else "cpu")
    torch._dynamo.reset()
    counters.clear()

    # the number of blocks differs from batch to batch
    for step, rows in enumerate((4, 6, 3, 5), 1):
        expected = gradients(model, rows, step)
        with enable_compiled_regions(backend):
            found = gradients(model, rows, step)
            # from the second step on, the step number is a variable too
            if step == 2:
                compiled = counters["stats"]["unique_graphs"]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

    assert not counters["graph_break"]
    assert compiled > 5
    assert counters["stats"]["unique_graphs"] == compiled, "compiled again for another size"


def test_a_graph_that_breaks_is_an_error():
    from bitlm_dist.compilation import compiled_region

    @compiled_region
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    assert broken(torch.ones(2)).eq(2).all()

    with (
        enable_compiled_regions("aot_eager"),
        pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"),
    ):
        broken(torch.ones(2))
