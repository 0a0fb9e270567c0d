"""A Weights & Biases run that survives restarts; the run folder has its id and the last steps sent.

W&B's rows are numbered by step and only ever appended: a step that was sent cannot be taken back,
and must not be sent again. After a restart from an older checkpoint, the steps up to the last one
sent are skipped; the run repeats them with the same values.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError, log_to_stderr
from bitlm_dist.files import write_atomically
from bitlm_dist.strict_json import to_json
from bitlm_dist.training.config import LoggingConfig

WANDB = "wandb.json"  # {"id": …, "sent": {file of the run folder: last step}}


def check_wandb(config: LoggingConfig) -> None:
    """Raise :class:`UserError` if W&B is asked for and its package is missing."""
    if config.wandb_project and find_spec("wandb") is None:
        raise UserError(
            "logging.wandb_project needs the package wandb: pip install 'bitlm-dist[wandb]'"
        )


def record_sent_steps(folder: Path, last_steps: Mapping[str, int]) -> None:
    """Record which steps W&B has, before their lines are dropped from the run folder.

    No-op for a run that was never sent to W&B.

    Args:
        folder: The run folder.
        last_steps: The last recorded step of each file of metrics.
    """
    record = _load_record(folder)
    if record is None:
        return

    sent = {name: max(step, record["sent"].get(name, 0)) for name, step in last_steps.items()}
    write_atomically(folder / WANDB, to_json({**record, "sent": sent}) + "\n")


def _load_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / WANDB).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        record = None

    if not isinstance(record, dict) or not {"id", "sent"} <= record.keys():
        raise UserError(
            f"{folder / WANDB} is damaged: remove it, and the run goes on as a new run "
            "of Weights & Biases"
        )
    return record


class WandbLog:
    """Sends metrics to the run's own W&B run. A failure to send never ends training.

    Args:
        folder: The run folder.
        config: The run's config, which is sent too; ``logging.wandb_project`` must be set.

    Raises:
        UserError: W&B refuses the run's first start, e.g. because nobody is logged in.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        logging = config.logging
        saved_record = _load_record(folder)
        record = saved_record or {"id": secrets.token_hex(6), "sent": {}}
        self._sent: dict[str, int] = record["sent"]

        self._run: Any = None
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                id=record["id"],
                name=logging.wandb_name or folder.resolve().name,
                group=logging.wandb_group,
                tags=list(logging.wandb_tags),
                config=config.model_dump(mode="json"),
                dir=str(folder),
                resume="allow",
                allow_val_change=True,  # a resumed run may have another layout
            )
        except Exception as error:
            why = " ".join(str(error).split())
            # At the first start this is most likely a mistake of the user; later it is transient.
            if saved_record is None:
                raise UserError(
                    f"logging.wandb_project = {logging.wandb_project}: W&B does not start ({why}): "
                    "run `wandb login`, set WANDB_MODE=offline, or leave the key out"
                ) from error
            log_to_stderr(
                f"W&B does not start ({why}); training goes on without it, "
                "and the next start of the run tries again"
            )
            return

        if saved_record is None:
            write_atomically(folder / WANDB, to_json(record) + "\n")

        # The first step whose row is still open: after the last one sent, by our record and by the
        # server's.
        self._next_open_step = max(1 + max(self._sent.values(), default=0), self._run.step)
        # Values of closed rows, to be sent with the next row.
        self._deferred: dict[str, Any] = {}
        self._has_sent = False  # True once this process has opened a row

    def send(
        self, file: str, step: int, values: Mapping[str, Any], *, fills_row: bool = False
    ) -> None:
        """Add values to the row of a step, or to the next row if that one is closed.

        Values that were sent before are skipped.

        Args:
            file: The file of the run folder that has these values, too.
            step: The step of the values.
            fills_row: The values are the row of their step, and are skipped if it is closed.
        """
        if (
            self._run is None
            or step <= self._sent.get(file, 0)
            or (fills_row and step < self._next_open_step)
        ):
            return

        # A save, for instance, may complete after the rows of later steps were sent.
        if step < self._next_open_step:
            self._deferred |= values
            return

        self._log({**self._deferred, **values}, step)
        self._deferred = {}
        self._next_open_step = step
        self._has_sent = True

    def send_texts(self, file: str, step: int, name: str, texts: Sequence[str]) -> None:
        """Add texts to the row of a step, as :meth:`send` does values."""
        import wandb

        pages = "".join(f"<pre>{escape(text)}</pre>" for text in texts)
        self.send(file, step, {name: wandb.Html(pages)})

    def _log(self, values: dict[str, Any], step: int) -> None:
        try:
            self._run.log(values, step=step)
        except Exception as error:
            log_to_stderr(
                f"W&B takes no more metrics ({' '.join(str(error).split())}); "
                "training goes on without it"
            )
            self._run = None

    def close(self) -> None:
        """Send the remaining values, and finish the W&B run."""
        # Only into a row that this process has opened: any other is for the resumed run to send.
        if self._run is not None and self._deferred and self._has_sent:
            self._log(self._deferred, self._next_open_step)

        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                log_to_stderr(f"W&B did not take all metrics ({' '.join(str(error).split())})")
