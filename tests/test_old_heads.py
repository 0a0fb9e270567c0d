"""Heads that earlier versions described by switches are built by their names of today."""

import ladder
import pytest

from bitlm_dist.config_loading import build_config, load_config
from bitlm_dist.errors import UserError
from bitlm_dist.old_heads import HEAD_SWITCHES, head_of_switches
from bitlm_dist.renamed_keys import with_current_keys

ROWS = ladder.rows()
# What the preset `bare` of earlier versions set, with the default of a key that has gone since.
BARE = {
    "preset": "bare",
    **{key: False for key in HEAD_SWITCHES if key not in ("head.output", "head.squash")},
    "head.channel_skip": True,
    "head.bits_per_group": 1,
    "head.num_mixture_components": 1,
    "model.codes": "frequency",
    "model.attention": "block",
    "model.input_window": 0,
    "diffusion.per_token_noise_prob": 0.0,
    "diffusion.next_token_loss_weight": 0.0,
    "diffusion.autoregressive_loss_weight": 0.0,
    "optimizer.matrix_optimizer": "adamw",
    "sampling.sampler": "ode",
    "sampling.temperature": 1.0,
}
# Rows of the study as earlier versions wrote them: each adds to the one before it.
STEPS = {
    "bare": {},
    "groups": {"head.bits_per_group": 6},
    "context-logits": {"head.context_logits": True},
    "posterior-input": {"head.posterior_input": True},
    "components": {"head.num_mixture_components": 8},
    "muon": {"optimizer.matrix_optimizer": "muon"},
    "per-token-noise": {"diffusion.per_token_noise_prob": 0.6},
    "codes": {"model.codes": "octave"},
    "lookahead": {
        "head.context_ahead": True,
        "head.input_condition": True,
        "head.position_table": True,
    },
    "windows": {"model.input_window": 8},
    "causal": {"model.attention": "causal", "diffusion.next_token_loss_weight": 1.0},
    "shared-readout": {"head.shared_readout": True},
}
OTHERS = {
    "default": {},
    "no-group-tables": {"head.group_tables": False},
    "no-lookahead": {"head.context_ahead": False},
    "no-input-condition": {"head.input_condition": False},
    "m1-no-group-tables": {"head.group_tables": False, "model.block_size": 1},
}


def old_rows():
    values = dict(BARE)
    for name, step in STEPS.items():
        values |= step
        yield name, dict(values)
    for name, values in OTHERS.items():
        yield name, HEAD_SWITCHES | values


@pytest.mark.parametrize("name", [*STEPS, *OTHERS])
def test_a_row_of_the_study_is_the_row_of_today(name):
    values = dict(old_rows())[name]
    row = load_config(None, ladder.words(ROWS[name])).config
    assert build_config(with_current_keys(values)) == row


def test_a_paper_head_is_the_paper_s():
    literal = dict.fromkeys(HEAD_SWITCHES, False) | {"head.output": "bits", "head.squash": "none"}
    no_pass = {"diffusion.autoregressive_loss_weight": 0.0}
    found = head_of_switches(literal | no_pass | {"preset": "paper"})
    assert (found["preset"], found["head.kind"]) == ("paper", "paper")

    # its output had a squashing, and the channel's logits, as options
    for other in ({"head.squash": "tanh"}, {"head.channel_skip": True}):
        with pytest.raises(UserError, match="has no head with head.output = bits"):
            head_of_switches(literal | no_pass | other)


@pytest.mark.parametrize(
    "values",
    [
        {"head.shared_readout": False},
        {"head.posterior_input": False},
        {"head.position_table": False},
        {"head.context_ahead": False, "head.input_condition": False},
        {"head.context_ahead": False, "diffusion.autoregressive_loss_weight": 0.0},
    ],
)
def test_other_mixtures_of_switches_are_refused_with_their_words(values):
    with pytest.raises(UserError) as caught:
        head_of_switches(values)
    message = str(caught.value)
    assert message.endswith(": use bitlm_dist 0.2.0 for this run")
    switches = {key: value for key, value in values.items() if key in HEAD_SWITCHES}
    assert all(f"{key} = {str(value).lower()}" in message for key, value in switches.items())


def test_a_block_of_one_token_has_no_lookahead_to_lack():
    for ahead in (False, True):
        found = head_of_switches({"head.context_ahead": ahead, "model.block_size": 1})
        assert found["head.kind"] == "bitlm"


@pytest.mark.parametrize(("loss", "kind"), [("bce", "bitlm"), ("x", "paper")])
def test_a_softmax_has_no_head_whatever_its_switches(loss, kind):
    switches = HEAD_SWITCHES | {"head.shared_readout": False, "head.output": "bits"}
    words = {"model.output": "softmax", "model.block_size": 1, "diffusion.loss": loss}
    losses = ("context", "autoregressive", "next_token")
    weights = {f"diffusion.{term}_loss_weight": 0.0 for term in losses}
    config = build_config(with_current_keys(switches | words | weights))
    assert (config.model.output, config.head.kind) == ("softmax", kind)
