"""One object a step in metrics.jsonl, an evaluation in evaluations.jsonl, a save in saves.jsonl; TensorBoard, Weights & Biases."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from typing import Any

from bitlm_dist.checkpoint.saver import Saved
from bitlm_dist.config import Config
from bitlm_dist.errors import say
from bitlm_dist.files import to_json
from bitlm_dist.training.wandb_log import WandbLog

METRICS, EVALUATIONS, SAVES = "metrics.jsonl", "evaluations.jsonl", "saves.jsonl"


class _Lines:
    """JSON lines at the end of a file; what a full disk does not take now goes with the next line."""

    def __init__(self, file: Path) -> None:
        self._file, self._left, self._failed = file, b"", False
        self._stream: RawIOBase | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        self._left += to_json(line).encode() + b"\n"
        try:
            self._stream = self._stream or self._file.open("ab", buffering=0)
            while self._left:
                self._left = self._left[self._stream.write(self._left) :]
            self._failed = False
        except OSError as error:
            if not self._failed:
                say(f"{self._file} cannot be written now ({error}); its lines are kept in memory")
            self._failed = True

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class MetricsLog:
    """Writes every step's metrics to the run folder before the next step begins; no failure to write ends a run.

    Args:
        folder: of the run, whose files hold nothing of steps after ``step``.
        config: of the run.
        step: steps taken; what TensorBoard has of later ones, which a killed process took, is hidden there.

    The first thing that is written raises :class:`UserError` where :class:`WandbLog` does.
    """

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        self._folder, self._config, self._step = folder, config, step
        self._steps, self._evaluations, self._saves = (_Lines(folder / name) for name in (METRICS, EVALUATIONS, SAVES))
        self._board: Any = None
        self._wandb: WandbLog | None = None
        self._opened = False

    def _open(self) -> None:
        """Begin this process's events. A start that takes no step leaves none, so they wait for something to write.

        By then the run folder has been rid of later steps, and knows which of them W&B has.
        """
        self._opened = True
        if self._config.logging.wandb_project:
            self._wandb = WandbLog(self._folder, self._config)
        if self._config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._step + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Record one step; ``metrics`` has the key ``step``."""
        self._steps.write(metrics)
        self._publish(METRICS, metrics["step"], metrics)

    def write_evaluation(self, spent: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Record an evaluation after ``spent`` (with the key ``step``), under the key ``validation``."""
        self._evaluations.write({**spent, "validation": report})
        mark = "approximate_" if report.get("bytes_note") else ""
        numbers = {
            f"validation/{mark if 'bits_per_byte' in name else ''}{name}": value
            for name, value in report.items()
            if isinstance(value, float)
        }
        self._publish(EVALUATIONS, spent["step"], numbers)

    def write_save(self, saved: Saved) -> None:
        """Record a completed checkpoint."""
        self._saves.write(asdict(saved))
        self._publish(SAVES, saved.step, {f"checkpoint/{name}": value for name, value in asdict(saved).items()})

    def _publish(self, file: str, step: int, values: Mapping[str, Any]) -> None:
        """Send what has a value to TensorBoard and W&B."""
        if not self._opened:
            self._open()
        known = {name: value for name, value in values.items() if value is not None and name != "step"}

        def add() -> None:
            for name, value in known.items():
                self._board.add_scalar(name, value, step)

        self._on_board(add)
        if self._wandb:
            self._wandb.send(file, step, known, fills_row=file == METRICS)

    def flush(self) -> None:
        """Bring all events to TensorBoard's file, where otherwise up to two minutes of them wait in memory.

        It comes before a checkpoint: a process that is killed afterwards and goes on from there repeats no step before it.
        """
        self._on_board(lambda: self._board.flush())

    def _on_board(self, action: Callable[[], None]) -> None:
        """Do something with TensorBoard's writer; a disk that is full ends that, not the run."""
        if self._board is None:
            return
        try:
            action()
        except OSError as error:
            say(f"TensorBoard's events cannot be written ({error}); there are no more of this process")
            self._board = None

    def close(self) -> None:
        """Flush everything."""
        for lines in (self._steps, self._evaluations, self._saves):
            lines.close()
        self._on_board(lambda: self._board.close())
        if self._wandb:
            self._wandb.close()


class NoLog:
    """Takes what :class:`MetricsLog` takes, on ranks that keep no log."""

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_evaluation(self, spent: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_save(self, saved: Saved) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
