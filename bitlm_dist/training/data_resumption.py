"""Resume the data where a checkpoint stopped, with a new batch or mixture if the config allows it.

A checkpoint records how many sequences of each source were read, and the origin of its mixture: the
position at which the mixture started. The resumed run keeps this origin, or starts a mixture at the
checkpoint if sources, weights or batch have changed. A source that remains continues where it
stopped.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.data.mixture import BEGINNING, Origin
from bitlm_dist.data.mixture_dataset import MixtureDataset, is_per_source_field, training_dataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.errors import UserError
from bitlm_dist.training.run_claim import (
    GLOBAL_BATCH_KEY,
    SOURCES_KEY,
    consent_key,
    is_change_allowed,
)


def resume_dataset(
    dataset: PackedDataset | MixtureDataset,
    config: Config,
    fingerprint: Mapping[str, Any],
    checkpoint: Path,
    state: Mapping[str, Any],
) -> PackedDataset | MixtureDataset:
    """Build the dataset of a resumed run.

    Args:
        dataset: the dataset of the config, from the first step of the run; closed if it is
            replaced.
        config: the config of the resumed run.
        fingerprint: the fingerprint of ``dataset`` and the global batch.
        checkpoint: the checkpoint's folder, for messages.
        state: the train state of the checkpoint.

    Raises:
        UserError: the data would not continue, or there is not enough of it for all steps.
    """
    saved = state.get("mixture") or _legacy_mixture_state_dict(state, config, dataset)
    before = _fields_by_source_index(state["fingerprint"])
    now = _fields_by_source_index(fingerprint)

    # sources are numbered, so those of another mixture cannot be compared field by field
    if dataset.mixture_spec != saved["shares"]:
        before, now = (
            {f: v for f, v in previous.items() if not is_per_source_field(f)}
            for previous in (before, now)
        )
        before[SOURCES_KEY] = saved["shares"]
        now[SOURCES_KEY] = dataset.mixture_spec

    for field, value in now.items():
        previous = before.get(field)
        if previous == value or is_change_allowed(field, config):
            continue
        consent = consent_key(field)
        advice = f"; {consent} = true allows it" if consent else ""
        raise UserError(
            f"{checkpoint} was trained with another {field} ({previous}, now {value}): "
            f"the data would not continue where it stopped{advice}"
        )

    origin = _mixture_origin(
        dataset,
        now[GLOBAL_BATCH_KEY] // config.data.sequence_length,
        saved,
        state["step"],
        state["next_sequence"],
    )
    if origin != dataset.origin:
        dataset.close()
        dataset = training_dataset(config, origin)

    dataset.check_source_limits(config.training.steps)
    return dataset


def mixture_state_dict(
    dataset: PackedDataset | MixtureDataset, sequences_per_step: int, step: int, sequence: int
) -> dict[str, Any]:
    """State of the mixture, as a checkpoint stores it: plain values only.

    Args:
        dataset: the dataset of the run.
        sequences_per_step: sequences per step.
        step: number of steps that the run has taken.
        sequence: number of sequences that the run has read.
    """
    sequences_read = dataset.sequences_read(step, sequence)

    return {
        "origin": asdict(dataset.origin),
        "shares": dataset.mixture_spec,
        "per_step": sequences_per_step,
        "taken": sequences_read,
    }


def _legacy_mixture_state_dict(
    state: Mapping[str, Any], config: Config, dataset: PackedDataset | MixtureDataset
) -> dict[str, Any]:
    """Derive the :func:`mixture_state_dict` of a checkpoint from before it was stored.

    Args:
        state: the train state of the checkpoint.
        config: the config of the resumed run.
        dataset: the dataset of the resumed run.

    Raises:
        UserError: the checkpoint had a mixture, and the mixture or the batch has changed.
    """
    sequences_per_step = state["fingerprint"][GLOBAL_BATCH_KEY] // config.data.sequence_length
    old = state["config"]["data"].get("sources", [])
    new = config.model_dump(mode="json")["data"]["sources"]

    if not old:
        sequences_read = {state["fingerprint"]["data.index"]: state["next_sequence"]}
        return {
            "origin": asdict(BEGINNING),
            "shares": [],
            "per_step": sequences_per_step,
            "taken": sequences_read,
        }

    # with the same mixture and batch, the counts per source follow from the position
    same_batch = state["fingerprint"][GLOBAL_BATCH_KEY] == config.training.global_batch_tokens
    if not same_batch or [_without_path(source) for source in old] != [
        _without_path(source) for source in new
    ]:
        raise UserError(
            "data.sources: the checkpoint is of a version that did not record what was read of "
            "each source: train to the next checkpoint with the same sources and batch first"
        )

    return mixture_state_dict(dataset, sequences_per_step, state["step"], state["next_sequence"])


def _mixture_origin(
    dataset: PackedDataset | MixtureDataset,
    sequences_per_step: int,
    saved: Mapping[str, Any],
    step: int,
    sequence: int,
) -> Origin:
    """Origin of the mixture of a resumed run.

    Args:
        dataset: the dataset of the config, from the first step of the run.
        sequences_per_step: sequences per step from now on.
        saved: the :func:`mixture_state_dict` of the checkpoint.
        step: the step of the checkpoint.
        sequence: the number of sequences read up to the checkpoint.

    Returns:
        The previous origin, or the checkpoint if sources, weights or batch have changed.
    """
    previous_origin = Origin(**saved["origin"])
    is_same_mixture = dataset.mixture_spec == saved["shares"]

    # a single source read from its beginning does not depend on the batch
    if is_same_mixture and (
        sequences_per_step == saved["per_step"]
        or (previous_origin == BEGINNING and not dataset.mixture_spec)
    ):
        return previous_origin

    return Origin(step, sequence, saved["taken"])


def _fields_by_source_index(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Key the fields of each source by its index instead of its folder's name, which may change."""
    by_index: dict[str, Any] = {}
    num_seen: Counter[str] = Counter()

    for field, value in fingerprint.items():
        field_name, of, _ = field.partition(" of ")
        num_seen[field_name] += 1
        by_index[f"{field_name} of source {num_seen[field_name]}" if of else field] = value

    return by_index


def _without_path(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != "path"}
