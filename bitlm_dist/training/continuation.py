"""Continue with the data where a checkpoint stopped, with another batch or mixture if the config allows it.

A checkpoint records how many sequences of each source were read, and where its mixture took over. The resumed run's mixture begins
where it began before, or at the checkpoint if sources, shares or batch are new. A source that stays continues where it stopped.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.data.feed import Feed
from bitlm_dist.data.mixed_feed import MixedFeed, of_one_source, training_feed
from bitlm_dist.data.mixture import BEGINNING, Origin
from bitlm_dist.errors import UserError
from bitlm_dist.training.run_folder import ALLOWING, BATCH, SOURCES, is_allowed


def continued(
    feed: Feed | MixedFeed, config: Config, fingerprint: Mapping[str, Any], checkpoint: Path, state: Mapping[str, Any]
) -> Feed | MixedFeed:
    """The feed of a run that resumes.

    Args:
        feed: what the config asks for, from the run's first step on; closed if another one takes its place.
        config: of the run that resumes.
        fingerprint: of ``feed`` and the global batch.
        checkpoint: for messages.
        state: of the checkpoint.

    Raises:
        UserError: the data would not continue, or there is not enough of it for all steps.
    """
    saved = state.get("mixture") or _record_of_old(state, config, feed)
    before, now = _by_position(state["fingerprint"]), _by_position(fingerprint)
    if feed.shares != saved["shares"]:
        before, now = ({f: v for f, v in found.items() if not of_one_source(f)} for found in (before, now))
        before[SOURCES], now[SOURCES] = saved["shares"], feed.shares
    for field, value in now.items():
        found = before.get(field)
        if found == value or is_allowed(field, config):
            continue
        advice = f"; {ALLOWING[field]} = true allows it" if field in ALLOWING else ""
        raise UserError(
            f"{checkpoint} was trained with another {field} ({found}, now {value}): "
            f"the data would not continue where it stopped{advice}"
        )

    origin = _next_origin(feed, now[BATCH] // config.data.sequence_length, saved, state["step"], state["next_sequence"])
    if origin != feed.origin:
        feed.close()
        feed = training_feed(config, origin)
    feed.check_steps(config.training.steps)
    return feed


def record(feed: Feed | MixedFeed, per_step: int, step: int, sequence: int) -> dict[str, Any]:
    """What a checkpoint of step ``step`` keeps so that the run can continue, with the same mixture or another; plain values.

    Args:
        feed: of the run.
        per_step: sequences per step.
        step, sequence: how many the run has read.
    """
    taken = feed.taken(step, sequence)
    return {"origin": asdict(feed.origin), "shares": feed.shares, "per_step": per_step, "taken": taken}


def _record_of_old(state: Mapping[str, Any], config: Config, feed: Feed | MixedFeed) -> dict[str, Any]:
    """The :func:`record` of a checkpoint that was written before there were any.

    Args:
        state: of the checkpoint.
        config, feed: of the run that resumes.

    Raises:
        UserError: it had a mixture, and now there is another or another batch.
    """
    per_step = state["fingerprint"][BATCH] // config.data.sequence_length
    old, new = state["config"]["data"].get("sources", []), config.model_dump(mode="json")["data"]["sources"]
    if not old:
        taken = {state["fingerprint"]["data.index"]: state["next_sequence"]}
        return {"origin": asdict(BEGINNING), "shares": [], "per_step": per_step, "taken": taken}
    same_batch = state["fingerprint"][BATCH] == config.training.global_batch_tokens
    if not same_batch or [_without_path(source) for source in old] != [_without_path(source) for source in new]:
        raise UserError(
            "data.sources: the checkpoint is of a version that did not record what was read of each source: "
            "train to the next checkpoint with the same sources and batch first"
        )
    return record(feed, per_step, state["step"], state["next_sequence"])


def _next_origin(feed: Feed | MixedFeed, per_step: int, saved: Mapping[str, Any], step: int, sequence: int) -> Origin:
    """Where the mixture of a resumed run begins: where it began before, or at the checkpoint if sources, shares or batch are new.

    Args:
        feed: what the config asks for, from the run's beginning.
        per_step: sequences per step from now on.
        saved: the :func:`record` of the checkpoint.
        step, sequence: of the checkpoint.
    """
    began = Origin(**saved["origin"])
    same = feed.shares == saved["shares"]
    if same and (per_step == saved["per_step"] or (began == BEGINNING and not feed.shares)):
        return began
    return Origin(step, sequence, saved["taken"])


def _by_position(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What describes one source under its number instead of its folder's name, which may change."""
    found: dict[str, Any] = {}
    numbers: Counter[str] = Counter()
    for field, value in fingerprint.items():
        kind, of, _ = field.partition(" of ")
        numbers[kind] += 1
        found[f"{kind} of source {numbers[kind]}" if of else field] = value
    return found


def _without_path(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != "path"}
