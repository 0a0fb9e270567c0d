"""The run that `bitlm eval` and `bitlm generate` load: its config, and what they may change in it.

Imports no torch, so that a wrong word is answered at once.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from bitlm_dist.config import Config
from bitlm_dist.config_loading import (
    all_keys,
    load_run_config,
    marks_of_keys,
    override_keys,
)
from bitlm_dist.config_section import Trained
from bitlm_dist.errors import UserError


def load_trained_config(run: Path, words: Sequence[str], command: str) -> Config:
    """Load the config of a trained run with overrides that leave the model what it is.

    Args:
        run: the run folder.
        words: command-line words, as in :func:`~bitlm_dist.config_loading.load_config`.
        command: the command, for messages.

    Raises:
        UserError: there is no run, or a word is no override, or it sets a key that does not exist,
            has an invalid value, or belongs to the model or its training.
    """
    known_keys = set(all_keys())
    for key in override_keys(words):
        # what is no key at all is reported with a hint when the config is loaded
        if key in known_keys and not is_changeable(key):
            whose = _role_of(key).value
            raise UserError(f"--{key} {whose}: `bitlm {command}` takes {_changeable_keys_text()}")

    return load_run_config(run, words)


def is_changeable(key: str) -> bool:
    """True if a key may be overridden for a trained model."""
    return _role_of(key) is Trained.FREE


def _role_of(key: str) -> Trained:
    return marks_of_keys(Trained).get(key, Trained.TRAINING)


def _changeable_keys_text() -> str:
    """List the keys that may be overridden: first the sections that may as a whole."""
    whole_sections: list[str] = []
    others: list[str] = []
    for section, keys_of_section in groupby(all_keys(), lambda key: key.rpartition(".")[0]):
        keys = list(keys_of_section)
        names = [key.rpartition(".")[2] for key in keys if is_changeable(key)]
        if len(names) == len(keys):
            if f"{section.rpartition('.')[0]}.*" not in whole_sections:
                whole_sections.append(f"{section}.*")
        elif names:
            choice = f"{{{', '.join(names)}}}" if len(names) > 1 else names[0]
            others.append(f"{section}.{choice}")

    *first, last = whole_sections + others
    return f"{', '.join(first)} and {last}"
