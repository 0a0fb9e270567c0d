"""A Weights & Biases run that goes on over restarts: its id, and what it was sent, are kept in the run folder.

W&B's rows are numbered by step and only ever appended: a step that was sent cannot be taken back, and is not sent again. After a
restart from an older checkpoint the steps up to the last one that was sent are left out; a run repeats them with the same values.
"""

import json
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config, LoggingConfig
from bitlm_dist.errors import UserError, say
from bitlm_dist.files import to_json, write_atomically

WANDB = "wandb.json"  # {"id": …, "sent": {file of the run folder: last step}}


def check_wandb(config: LoggingConfig) -> None:
    """Raise :class:`UserError` if W&B is asked for and its package is missing."""
    if config.wandb_project and find_spec("wandb") is None:
        raise UserError("logging.wandb_project needs the package wandb: pip install 'bitlm-dist[wandb]'")


def remember_sent(folder: Path, last: Mapping[str, int]) -> None:
    """Before lines of metrics are dropped, keep in mind which steps W&B has; no-op for a run that was never sent there.

    Args:
        folder: of the run.
        last: by file of metrics, the last step on record.
    """
    found = _read(folder)
    if found is None:
        return
    sent = {name: max(step, found["sent"].get(name, 0)) for name, step in last.items()}
    write_atomically(folder / WANDB, to_json({**found, "sent": sent}) + "\n")


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / WANDB).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"id", "sent"} <= found.keys():
        raise UserError(f"{folder / WANDB} is damaged: remove it, and the run goes on as a new one of Weights & Biases")
    return found


class WandbLog:
    """Sends metrics to the run's own W&B run. No failure to send ends training.

    Args:
        folder: of the run.
        config: of the run, which goes there with it; ``logging.wandb_project`` is set.

    Raises:
        UserError: W&B refuses the run's first start, e.g. because nobody is logged in.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        logging, known = config.logging, _read(folder)
        found = known or {"id": secrets.token_hex(6), "sent": {}}
        self._sent: dict[str, int] = found["sent"]
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                id=found["id"],
                name=logging.wandb_name or folder.resolve().name,
                tags=list(logging.wandb_tags),
                config=config.model_dump(mode="json"),
                dir=str(folder),
                resume="allow",
                allow_val_change=True,  # a resumed run may have another layout
            )
        except Exception as error:
            why = " ".join(str(error).split())
            if known is None:
                raise UserError(
                    f"logging.wandb_project = {logging.wandb_project}: W&B does not start ({why}): "
                    "run `wandb login`, set WANDB_MODE=offline, or leave the key out"
                ) from error
            say(f"W&B does not start ({why}); training goes on without it, and the next start of the run tries again")
            return
        if known is None:
            write_atomically(folder / WANDB, to_json(found) + "\n")
        # the first step whose row takes values: after the last that was sent, by our record and by the server's
        self._open = max(1 + max(self._sent.values(), default=0), self._run.step)
        self._late: dict[str, Any] = {}  # values of rows that are closed; the next row takes them
        self._sending = False  # whether this process has opened a row

    def send(self, file: str, step: int, values: Mapping[str, Any], *, fills_row: bool = False) -> None:
        """Add values to the row of a step, or to the next one where that is closed; values that were sent before are left out.

        Args:
            file: of the run folder that has them too.
            step: whose values they are.
            fills_row: they are the row of their step, and are left out where it is closed.
        """
        if self._run is None or step <= self._sent.get(file, 0) or (fills_row and step < self._open):
            return
        if step < self._open:
            self._late |= values
            return
        self._log({**self._late, **values}, step)
        self._late, self._open, self._sending = {}, step, True

    def _log(self, values: dict[str, Any], step: int) -> None:
        try:
            self._run.log(values, step=step)
        except Exception as error:
            say(f"W&B takes no more metrics ({' '.join(str(error).split())}); training goes on without it")
            self._run = None

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None and self._late and self._sending:
            self._log(self._late, self._open)
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                say(f"W&B did not take all metrics ({' '.join(str(error).split())})")
