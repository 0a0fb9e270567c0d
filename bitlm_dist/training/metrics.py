"""One object a step in metrics.jsonl, an evaluation in evaluations.jsonl, a save in saves.jsonl; TensorBoard, Weights & Biases."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitlm_dist.checkpoint.saver import Saved
from bitlm_dist.config import LoggingConfig
from bitlm_dist.errors import UserError

METRICS, EVALUATIONS, SAVES = "metrics.jsonl", "evaluations.jsonl", "saves.jsonl"


class MetricsLog:
    """Writes every step's metrics to the run folder; a line is on disk before the next step begins."""

    def __init__(self, folder: Path, config: LoggingConfig) -> None:
        self._lines = (folder / METRICS).open("a", encoding="utf-8", buffering=1)
        self._evaluations, self._saves = folder / EVALUATIONS, folder / SAVES
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
        self._lines.write(json.dumps(metrics) + "\n")
        self._publish(metrics)

    def write_evaluation(self, spent: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Record an evaluation after ``spent`` (with the key ``step``), under the key ``validation``."""
        with self._evaluations.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**spent, "validation": report}) + "\n")
        numbers = {f"validation/{name}": value for name, value in report.items() if isinstance(value, float)}
        self._publish({"step": spent["step"], **numbers})

    def write_save(self, saved: Saved) -> None:
        """Record a completed checkpoint."""
        with self._saves.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(saved)) + "\n")
        self._publish({"step": saved.step, **{f"checkpoint/{n}": v for n, v in asdict(saved).items() if n != "step"}})

    def _publish(self, metrics: Mapping[str, Any]) -> None:
        step = metrics["step"]
        for name, value in metrics.items():
            if self._board and name != "step":
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flush everything."""
        self._lines.close()
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
