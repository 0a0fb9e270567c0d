"""The heads of earlier versions, which switches in the section ``head`` described.

A run of such a version has a head of today if its switches are those of one. Others cannot be
built any more.
"""

from collections.abc import Mapping
from typing import Any

from bitlm_dist.errors import UserError

# The switches, and what a config without them meant.
HEAD_SWITCHES = {
    "head.output": "mixture",
    "head.squash": "tanh",
    "head.channel_skip": True,
    "head.context_logits": True,
    "head.posterior_input": True,
    "head.context_ahead": True,
    "head.input_condition": True,
    "head.position_table": True,
    "head.shared_readout": True,
    "head.group_tables": True,
}
_ITEMS = tuple(HEAD_SWITCHES)[3:]
_AUTOREGRESSIVE = "diffusion.autoregressive_loss_weight"
# What each head lacks of the default's.
_LACKING: dict[str, set[str]] = {
    "bitlm": set(),
    "no_lookahead": {"head.context_ahead"},
    "no_input_condition": {"head.input_condition"},
    "no_group_tables": {"head.group_tables"},
}
_LACKING["no_autoregressive_pass"] = {*_LACKING["no_group_tables"], _AUTOREGRESSIVE}
_LACKING["own_readout"] = {*_LACKING["no_autoregressive_pass"], "head.shared_readout"}
_LACKING["plain_conditioning"] = {
    *_LACKING["own_readout"],
    "head.context_ahead",
    "head.input_condition",
    "head.position_table",
}
_LACKING["no_posterior_input"] = {*_LACKING["plain_conditioning"], "head.posterior_input"}
_LACKING["bare"] = {*_LACKING["no_posterior_input"], "head.context_logits"}


def head_of_switches(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of today that mean what the switches of an earlier version meant.

    Args:
        values: a config of that version, by dotted key.

    Raises:
        UserError: No head of this version has these switches.
    """
    switches = {key: values.get(key, default) for key, default in HEAD_SWITCHES.items()}
    lacking = {key for key in _ITEMS if not switches[key]}
    if not values.get(_AUTOREGRESSIVE, 1.0):
        # the group tables are a part of that pass
        lacking |= {_AUTOREGRESSIVE, "head.group_tables"}
    # a block of one token has nothing to look ahead at
    ignored = {"head.context_ahead"} if values.get("model.block_size") == 1 else set()

    current: dict[str, Any] = {"preset": "paper" if values.get("preset") == "paper" else "default"}
    if values.get("model.output") == "softmax":
        # it has no head, but the kind must go with the loss
        has_bce = values.get("diffusion.loss", "bce") == "bce"
        return current | {"head.kind": "bitlm" if has_bce else "paper"}

    name = _name(lacking, ignored)
    if name == "bare":
        current["diffusion.context_loss_weight"] = 0.0
    if switches["head.output"] == "bits":
        is_literal = switches["head.squash"] == "none" and not switches["head.channel_skip"]
        name = "paper" if is_literal and name == "bare" else ""

    if name in ("bitlm", "paper"):
        return current | {"head.kind": name}
    if name:
        return current | {"head.kind": "ablation", "head.ablation": name}
    described = ", ".join(f"{key} = {str(value).lower()}" for key, value in switches.items())
    raise UserError(f"this version has no head with {described}: use bitlm_dist 0.2.0 for this run")


def _name(lacking: set[str], ignored: set[str]) -> str:
    """The head that lacks these items; empty if there is none."""
    names = (name for name, items in _LACKING.items() if items - ignored == lacking - ignored)
    return next(names, "")
