import time

import pytest
import torch

from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.inference.config import SamplingConfig
from bitlm_dist.inference.generate import (
    GenerationStats,
    generate_batch,
    generate_blocks,
    sample_block,
)

pytestmark = pytest.mark.integration

SAMPLERS = {
    "sequential": SamplingConfig(sampler="sequential", temperature=1.0),
    "ode": SamplingConfig(sampler="ode", steps=5, temperature=1.0),
    "sde": SamplingConfig(sampler="sde", steps=5, temperature=1.0),
}


def generated(model, prompt=(), **changes):
    settings = {"bos": 0, "num_blocks": 6, "sampling": SAMPLERS["sequential"], "seed": 4, **changes}
    return [token for part in generate_blocks(model, list(prompt), **settings) for token in part]


@pytest.fixture
def model(tiny_model):
    model = tiny_model().eval()
    model.eos = -1  # an untrained model would end somewhere
    return model


@pytest.mark.parametrize("sampling", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("prompt", [(), (5, 6, 7, 8), (5, 6, 7, 8, 9, 10)])
def test_cached_generation_equals_uncached(model, sampling, prompt, seed):
    cached = generated(model, prompt, sampling=sampling, seed=seed % 2**31)
    uncached = generated(model, prompt, sampling=sampling, seed=seed % 2**31, use_cache=False)
    assert cached == uncached
    assert len(cached) == 24 - len(prompt) % 4


def test_a_softmax_generates_with_its_cache_as_without(tiny, seed):
    from bitlm_dist.codes import BitCodes, natural_codes
    from bitlm_dist.model.build import build_model

    softmax = build_model(
        tiny("--model.output", "softmax"), BitCodes(natural_codes(300), 9), eos=-1
    ).eval()
    sampling = SAMPLERS["sequential"]
    cached = generated(softmax, (5, 6, 7), num_blocks=20, sampling=sampling, seed=seed % 2**31)

    assert cached == generated(
        softmax, (5, 6, 7), num_blocks=20, sampling=sampling, seed=seed % 2**31, use_cache=False
    )
    assert len(cached) == 20

    greedy = generated(
        softmax, (5, 6, 7), sampling=sampling.model_copy(update={"temperature": 0.0})
    )
    # the same greedy continuation, without a cache and without the sampler
    tokens = [0, 5, 6, 7]

    for _ in range(6):
        tokens.append(
            softmax.output.logits(softmax.hidden_states(torch.tensor([tokens]))[0, -1])
            .argmax()
            .item()
        )

    assert greedy == tokens[4:]


def test_time_to_wait_for_the_device_counts(model, monkeypatch):
    """Launches on a GPU return at once; here, only reading the tokens takes time: two seconds."""
    clock = [0.0]

    def read(tensor, tolist=torch.Tensor.tolist):
        clock[0] += 2
        return tolist(tensor)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    stats = GenerationStats()
    generated(model, num_blocks=3, stats=stats)

    assert stats.seconds == 6


def test_rows_of_a_batch_are_independent(model, seed):
    """Row 0 is generated as if it were alone, and rows with the same prompt differ."""
    prompts = torch.randint(2, 300, (3, 6))
    prompts[2] = prompts[1]
    settings = {"bos": 0, "num_blocks": 5, "sampling": SAMPLERS["sequential"], "seed": 4}
    blocks = torch.cat(list(generate_batch(model, prompts, **settings)), 1)

    assert torch.equal(blocks[:, :2], prompts[:, 4:])
    assert blocks[0, 2:].tolist() == generated(model, prompts[0].tolist(), num_blocks=5)
    assert not torch.equal(blocks[1], blocks[2])


def test_the_same_seed_writes_the_same_text_and_another_one_another(model):
    assert generated(model) == generated(model)
    assert generated(model) != generated(model, seed=5)


def test_passes_are_counted(model):
    for name, head_passes in (("sequential", 4), ("ode", 5), ("sde", 5)):
        stats = GenerationStats()
        generated(model, sampling=SAMPLERS[name], stats=stats)
        assert (stats.backbone_passes, stats.head_passes, stats.tokens) == (
            6,
            6 * head_passes,
            24,
        )

    # tokens that the prompt fixes cost no pass
    stats = GenerationStats()
    generated(model, (5, 6, 7), num_blocks=1, stats=stats)

    assert (stats.head_passes, stats.tokens) == (1, 1), "the prompt fixed three tokens of the block"


def test_guidance_doubles_the_passes(tiny_model):
    model = tiny_model("--diffusion.context_dropout", "0.1").eval()
    model.eos = -1
    stats = GenerationStats()
    generated(model, sampling=SAMPLERS["ode"].model_copy(update={"guidance": 2.0}), stats=stats)
    assert stats.head_passes == 2 * 6 * 5


def test_text_ends_before_eos(model):
    free = generated(model)
    model.eos = free[9]
    assert generated(model) == free[: free.index(model.eos)]


def test_every_token_is_a_token(tiny_model):
    """With 300 of 512 codes in use, an untrained head samples invalid ones, to be projected."""
    model = tiny_model().eval()
    model.eos = -1
    for sampling in SAMPLERS.values():
        assert all(0 <= token < 300 for token in generated(model, num_blocks=30, sampling=sampling))
    hidden = torch.randn(200, 4, 32)
    source = NoiseKey(1, torch.arange(200), torch.zeros(200, dtype=torch.int64))
    bits = sample_block(model, hidden, SAMPLERS["ode"], source, project_to_valid=False).bits

    assert (model.codes.bits_to_ids(bits) < 0).any()


def test_an_invalid_code_is_projected_by_the_estimate_not_by_its_signs(tiny_model):
    model = tiny_model().eval()
    source = NoiseKey(1, torch.arange(200), torch.zeros(200, dtype=torch.int64))
    hidden = torch.randn(200, 4, 32, generator=torch.Generator().manual_seed(1))
    drawn = sample_block(model, hidden, SAMPLERS["ode"], source, project_to_valid=False)
    settled = sample_block(model, hidden, SAMPLERS["ode"], source)
    expected = model.codes.nearest_ids(drawn.denoised)

    assert torch.equal(model.codes.bits_to_ids(settled.bits), expected)
    assert not torch.equal(model.codes.nearest_ids(drawn.bits), expected)


def test_watch_sees_every_pass(model):
    seen = []
    generated(
        model, num_blocks=2, callback=lambda step, denoised: seen.append((step, denoised.shape))
    )
    assert seen == [(i + 1, (1, 4, 9)) for _ in range(2) for i in range(4)]
