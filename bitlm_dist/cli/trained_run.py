"""The run that `bitlm eval` and `bitlm generate` load: its config, and what they may change in it.

Imports no torch, so that a wrong word is answered at once.
"""

from collections.abc import Sequence
from pathlib import Path

from bitlm_dist.config import Config
from bitlm_dist.config_loading import all_keys, load_run_config, override_keys
from bitlm_dist.errors import UserError
from bitlm_dist.training.trained_files import ATTENTION_KEY, describes_model

# What does not change the trained model: how it is evaluated and sampled from, and where it runs.
_CHANGEABLE_SECTIONS = ("evaluation.", "sampling.", "parallel.", "logging.")
_CHANGEABLE_KEYS = (
    "data.path",
    "data.cache",
    "data.cache_limit",
    "data.workers",
    ATTENTION_KEY,
)
_CHANGEABLE_TEXT = (
    "evaluation.*, sampling.*, parallel.*, logging.*, data.{path, cache, cache_limit, workers} "
    f"and {ATTENTION_KEY}"
)


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
            whose = (
                "describes the trained model, which stays as it is"
                if describes_model(key)
                else "is a key of training"
            )
            raise UserError(f"--{key} {whose}: `bitlm {command}` takes {_CHANGEABLE_TEXT}")

    return load_run_config(run, words)


def is_changeable(key: str) -> bool:
    """True if a key may be overridden for a trained model."""
    return key.startswith(_CHANGEABLE_SECTIONS) or key in _CHANGEABLE_KEYS
