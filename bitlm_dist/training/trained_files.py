"""The files of a run folder from which a trained model is loaded. Imports no torch.

So `bitlm eval` and `bitlm generate` report what is missing at once.
"""

from pathlib import Path

from bitlm_dist.checkpoint.steps import MANIFEST, all_steps, folder_of, read_train_state
from bitlm_dist.config import Config
from bitlm_dist.config_loading import flatten, marks_of_keys, value_as_yaml
from bitlm_dist.config_section import Trained
from bitlm_dist.errors import UserError
from bitlm_dist.renamed_keys import with_current_keys
from bitlm_dist.training.checkpoint_folder import CHECKPOINTS, checkpoint_steps
from bitlm_dist.training.export_record import EXPORT_RECORD

CODES = "codes.npz"
TOKENIZER = "tokenizer"


def find_trained_steps(run: Path, config: Config) -> list[int]:
    """Find the steps that a model can be loaded from, ascending, at least one.

    Args:
        run: the run folder.
        config: the run's config, with overrides applied.

    Raises:
        UserError: the run has no complete checkpoint, a file that every model needs is missing, or
            the config asks for moving averages that the run does not have.
    """
    if config.evaluation.use_ema and not config.optimizer.ema:
        raise UserError(
            f"evaluation.use_ema = true: {run} was trained without optimizer.ema "
            "and has no average: set it false"
        )

    steps = checkpoint_steps(run)
    if not steps:
        raise _no_checkpoint_error(run)

    if not (run / TOKENIZER).is_dir() or not any((run / TOKENIZER).iterdir()):
        raise UserError(
            f"{run / TOKENIZER} is missing: copy the folder {TOKENIZER} of the prepared data there"
        )
    if not (run / CODES).is_file():
        raise missing_codes_error(run, "is missing")
    return steps


def _no_checkpoint_error(run: Path) -> UserError:
    """The error for a folder without a complete checkpoint."""
    if damaged := all_steps(run / CHECKPOINTS):
        folder = folder_of(run / CHECKPOINTS, damaged[-1])
        return UserError(
            f"{folder} is damaged: it has no {MANIFEST}: restore it from a backup, "
            "or remove the folder"
        )
    if (run / EXPORT_RECORD).is_file():
        return UserError(
            f"{run} is an exported folder: `bitlm checkpoint import {run} RUN` makes a run of it"
        )
    return UserError(
        f"{run} holds no checkpoint yet: train it with `bitlm train {run}/config.yaml`"
    )


def check_same_model(run: Path, config: Config, checkpoint: Path) -> None:
    """Check that a checkpoint was trained with the model that the config describes.

    Its tensors do not tell: with another `rope_theta` they have the same shapes.

    Args:
        run: the run folder, for messages.
        config: the run's config, with overrides applied.
        checkpoint: the folder of the checkpoint.

    Raises:
        UserError: a key has another value now.
    """
    # A key that is not there is newer than the checkpoint.
    saved = read_train_state(checkpoint).get("config", {})
    trained_with = with_current_keys(dict(flatten(saved)))

    marks = marks_of_keys(Trained)
    for key, value in flatten(config.model_dump(mode="json")):
        if marks.get(key) is Trained.MODEL and trained_with.get(key, value) != value:
            raise UserError(
                f"{run / 'config.yaml'}: {key} = {value_as_yaml(value)}, but {checkpoint.name} was "
                f"trained with {value_as_yaml(trained_with[key])}: restore that value"
            )


def missing_codes_error(run: Path, problem: str) -> UserError:
    """The error for codes that cannot be read.

    Args:
        run: the run folder.
        problem: what is wrong with the file.
    """
    return UserError(
        f"{run / CODES} {problem}: copy it from a backup of the run, or from a run that was "
        "trained with the same data and the same model section"
    )
