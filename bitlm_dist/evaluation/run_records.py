"""Runs to be compared: their evaluations, and which of these are of the same text.

Imports no torch.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.config_loading import load_run_config
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.judgement import best_bits_per_byte
from bitlm_dist.training.evaluation_records import (
    BY_EVAL,
    ScoredText,
    read_evaluations,
    scored_text,
)


@dataclass(frozen=True)
class RunRecord:
    """A run: its config, the command that trained it, and its evaluations in order of steps.

    Attributes:
        name: of the folder, or its path if another run that is compared has the same name.
        command: None if the run folder does not say it.
        latest: the evaluation of the latest step that is compared.
    """

    folder: Path
    name: str
    config: Config
    command: str | None
    evaluations: list[dict[str, Any]]
    latest: dict[str, Any]

    @property
    def note(self) -> str | None:
        """Reason why the bits per byte are not those of the text.

        None: they are, or the evaluation predates the check.
        """
        note: str | None = self.latest["validation"].get("bytes_note")
        return note

    @property
    def bits_per_byte(self) -> float | None:
        """The best known value, see :func:`best_bits_per_byte`."""
        return best_bits_per_byte(self.latest["validation"])


def load_record(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: the folder is not a run folder, or holds no evaluations.
    """
    config = load_run_config(folder)
    evaluations = read_evaluations(folder)
    if not evaluations:
        raise UserError(
            f"{folder} holds no evaluations: train it with --evaluation.every_steps N, "
            f"or evaluate it with `bitlm eval {folder}`"
        )

    latest = list(_of_latest_step(evaluations).values())
    trained = [entry for entry in latest if entry.get("by") != BY_EVAL]
    command = _read_command(folder)
    return RunRecord(folder, folder.name, config, command, evaluations, (trained or latest)[-1])


def load_records(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders; of each run's latest step, choose evaluations of one text, if there are.

    So runs that training evaluated on other samples are compared on what `bitlm eval` scored.

    Raises:
        UserError: see :func:`load_record`.
    """
    records = [load_record(folder) for folder in folders]
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        records = [replace(record, name=str(record.folder)) for record in records]

    choices = [_of_latest_step(record.evaluations) for record in records]
    text = _common_text(choices)
    if text is None:
        return records
    return [
        replace(record, latest=by_text[text])
        for record, by_text in zip(records, choices, strict=True)
    ]


def _common_text(
    choices: Sequence[Mapping[ScoredText | None, Mapping[str, Any]]],
) -> ScoredText | None:
    """The text that every run was scored on, by training if possible, else the longest; or None."""
    texts = set.intersection(*({text for text in choice if text} for choice in choices))
    by_training = {
        text for text in texts if all(choice[text].get("by") != BY_EVAL for choice in choices)
    }
    return max(by_training or texts, key=lambda text: (text.tokens, text), default=None)


def _of_latest_step(
    evaluations: Sequence[dict[str, Any]],
) -> dict[ScoredText | None, dict[str, Any]]:
    """The evaluations of the latest step by text; one of training goes before later ones."""
    by_text: dict[ScoredText | None, dict[str, Any]] = {}
    for entry in evaluations:
        text = scored_text(entry)
        is_after_training = entry.get("by") == BY_EVAL and (
            text in by_text and by_text[text].get("by") != BY_EVAL
        )
        if entry["step"] == evaluations[-1]["step"] and not is_after_training:
            by_text[text] = entry
    return by_text


def _read_command(folder: Path) -> str | None:
    """The command that trained a run, without the path of the executable on its machine."""
    try:
        words = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["command"]
        return shlex.join(["bitlm", *words[1:]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_same_text(record: RunRecord, base: RunRecord) -> bool | None:
    """Whether two runs were scored on the same text; None if nobody recorded it."""
    own, other = (scored_text(r.latest) for r in (record, base))
    if record is base or (own is not None and own == other):
        return True
    # An older version recorded the number of tokens only.
    is_unknown = (own is None or other is None) and num_tokens(record) == num_tokens(base)
    return None if is_unknown else False


def num_tokens(record: RunRecord) -> int:
    """Number of tokens that the compared evaluation scored."""
    return int(record.latest["validation"]["tokens"])
