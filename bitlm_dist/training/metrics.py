"""One object a step in metrics.jsonl, an evaluation in evaluations.jsonl, a save in saves.jsonl; TensorBoard, Weights & Biases."""

from collections.abc import Mapping
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from typing import Any

from bitlm_dist.checkpoint.saver import Saved
from bitlm_dist.config import LoggingConfig
from bitlm_dist.errors import UserError, say
from bitlm_dist.files import to_json

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
    """Writes every step's metrics to the run folder before the next step begins; no failure to write ends a run."""

    def __init__(self, folder: Path, config: LoggingConfig) -> None:
        self._steps, self._evaluations, self._saves = (_Lines(folder / name) for name in (METRICS, EVALUATIONS, SAVES))
        self._board: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if config.wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError("logging.wandb_project needs the package wandb: pip install 'bitlm-dist[wandb]'") from None
            self._wandb = wandb.init(project=config.wandb_project, dir=str(folder), resume="allow")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Record one step; ``metrics`` has the key ``step``."""
        self._steps.write(metrics)
        self._publish(metrics)

    def write_evaluation(self, spent: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Record an evaluation after ``spent`` (with the key ``step``), under the key ``validation``."""
        self._evaluations.write({**spent, "validation": report})
        numbers = {f"validation/{name}": value for name, value in report.items() if isinstance(value, float)}
        self._publish({"step": spent["step"], **numbers})

    def write_save(self, saved: Saved) -> None:
        """Record a completed checkpoint."""
        self._saves.write(asdict(saved))
        self._publish({f"checkpoint/{name}": value for name, value in asdict(saved).items()} | {"step": saved.step}, late=True)

    def _publish(self, metrics: Mapping[str, Any], late: bool = False) -> None:
        """``late``: of a step that may be over; Weights & Biases takes it with the next one."""
        step = metrics["step"]
        if self._board:
            try:
                for name, value in metrics.items():
                    if name != "step":
                        self._board.add_scalar(name, value, step)
            except OSError as error:
                say(f"TensorBoard's events cannot be written ({error}); there are no more of this process")
                self._board = None
        if self._wandb:
            self._wandb.log(dict(metrics), **({"commit": False} if late else {"step": step}))

    def close(self) -> None:
        """Flush everything."""
        for lines in (self._steps, self._evaluations, self._saves):
            lines.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


class NoLog:
    """Takes what :class:`MetricsLog` takes, on ranks that keep no log."""

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_evaluation(self, spent: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_save(self, saved: Saved) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
