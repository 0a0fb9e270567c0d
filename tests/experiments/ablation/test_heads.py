"""The heads of the study lack what their docstrings say, and nothing else."""

import pytest
import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import build_model
from bitlm_dist.model.heads.bitlm import BitLMHead
from bitlm_dist.model.heads.build import head_class

NO_PASS = ("--diffusion.autoregressive_loss_weight", "0")
NO_TERMS = (
    *NO_PASS,
    *("--diffusion.context_loss_weight", "0", "--diffusion.next_token_loss_weight", "0"),
)
# Name: the parts of the default's head that it has not, and words that its losses need.
TABLES = {"conditional_group_logits"}
PASS = TABLES | {"previous_token_in"}
PLAIN = PASS | {"positions", "position_bias", "lookahead"}
LACKING = {
    "no_group_tables": (TABLES, ()),
    "no_autoregressive_pass": (PASS, NO_PASS),
    "own_readout": (PASS, NO_PASS),
    "plain_conditioning": (PLAIN, NO_PASS),
    "no_posterior_input": (PLAIN | {"posterior_in"}, NO_PASS),
    "bare": (PLAIN | {"posterior_in", "context_out"}, NO_TERMS),
    "no_lookahead": ({"lookahead"}, ()),
    "no_input_condition": ({"position_bias"}, ()),
}
OWN_READOUT = ("own_readout", "plain_conditioning", "no_posterior_input", "bare")


def ablation(name, *overrides):
    return "--head.kind", "ablation", "--head.ablation", name, *overrides


@pytest.fixture
def head_of(tiny):
    def make(*overrides):
        return build_model(tiny(*overrides), BitCodes(natural_codes(300), 9), eos=1).head

    return make


@pytest.mark.parametrize("name", LACKING)
def test_a_head_lacks_the_parameters_of_its_items(name, head_of):
    lacking, words = LACKING[name]
    default = dict(head_of().named_parameters())
    head = dict(head_of(*ablation(name, *words)).named_parameters())
    assert {key.split(".")[0] for key in default.keys() - head.keys()} == lacking
    assert head.keys() <= default.keys()

    # with a readout of its own, the last layer predicts logits and no state
    other = {key for key in head if head[key].shape != default[key].shape}
    assert other == ({"final.weight", "final.bias"} if name in OWN_READOUT else set())

    # what both have begins with the same weights
    assert all(torch.equal(head[key], default[key]) for key in head.keys() - other)


def test_the_table_above_has_every_head(tiny):
    for name in LACKING:
        assert issubclass(head_class(tiny(*ablation(name))), BitLMHead)
    with pytest.raises(UserError, match=rf"there are {', '.join(LACKING)}$"):
        head_class(tiny(*ablation("nosuch")))


@pytest.mark.parametrize("block", ["1", "4"])
def test_a_loss_that_a_head_has_not_is_refused(block, head_of):
    with pytest.raises(UserError, match=r"context_loss_weight = 1.0: head.ablation = bare has no"):
        head_of(*ablation("bare", "--model.block_size", block))


def test_a_bare_head_ignores_the_backbone_until_it_is_trained(head_of, seed):
    """Its logits are those of the noisy bits alone: gates are closed and it adds no context."""
    head = head_of(*ablation("bare", *NO_TERMS))
    noisy = torch.randn(6, 4, 9)
    t = torch.rand(6, 4)
    logits = [head.denoise(noisy, t, head.condition(torch.randn(6, 4, 32))) for _ in range(2)]
    assert torch.equal(*logits)
