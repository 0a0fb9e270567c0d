"""Initial weights depend on the seed and the name of the tensor alone."""

import math

import pytest
import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.initialization import seeded_init

CODES = BitCodes(natural_codes(300), 9)


def test_weights_do_not_depend_on_what_was_drawn_before_and_disturb_nothing(tiny, seed):
    config = tiny("--training.seed", str(seed))
    first = dict(BitLM(config, CODES, eos=1).named_parameters())
    torch.rand(7)
    state = torch.get_rng_state()
    second = dict(BitLM(config, CODES, eos=1).named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_seeds_and_other_layers_draw_other_weights(tiny, seed):
    one, other = (
        dict(BitLM(tiny("--training.seed", str(s)), CODES, eos=1).named_parameters())
        for s in (seed, seed + 1)
    )
    matrices = [name for name, tensor in one.items() if tensor.dim() >= 2 and tensor.any()]

    assert len(matrices) > 10
    assert not any(torch.equal(one[name], other[name]) for name in matrices)

    layers = [one[name] for name in matrices if name.endswith("linear_fc2.weight")]
    assert len(layers) == 2
    assert not torch.equal(*layers)


def test_standard_deviations(tiny):
    config = tiny("--model.backbone.hidden_size", "64", "--model.backbone.ffn_hidden_size", "256")
    for name, tensor in BitLM(config, CODES, eos=1).backbone.named_parameters():
        if tensor.dim() < 2:
            assert bool((tensor == 1).all()), name
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.02 / math.sqrt(2 * config.model.backbone.num_layers) if residual else 0.02
        assert float(tensor.detach().std()) == pytest.approx(
            expected, rel=5 / math.sqrt(2 * tensor.numel())
        ), name


def test_names_have_streams_of_their_own(seed):
    draws = []
    for name in ("one", "two", "one"):
        with seeded_init(seed, name):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
