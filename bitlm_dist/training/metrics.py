"""Logs of a run: JSON lines in the run folder, TensorBoard, and Weights & Biases.

metrics.jsonl has one object per step, evaluations.jsonl one per evaluation, saves.jsonl one per
checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitlm_dist.config import Config
from bitlm_dist.errors import log_to_stderr
from bitlm_dist.strict_json import to_json
from bitlm_dist.training.wandb_log import WandbLog

if TYPE_CHECKING:  # what reads these files alone needs no torch, which takes seconds to import
    from bitlm_dist.checkpoint.saver import SaveStats

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAVES = "saves.jsonl"
SAMPLES = "samples.jsonl"
LOG_FILES = (METRICS, EVALUATIONS, SAVES, SAMPLES)


class _JsonLinesFile:
    """Appends JSON lines to a file; retries lines that a full disk refused with the next one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._unwritten = b""
        self._has_failed = False
        self._stream: RawIOBase | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line now, or with a later one if the file cannot be written."""
        self._unwritten += to_json(line).encode() + b"\n"

        try:
            # Unbuffered: a killed process must not take lines with it, and an error shows here.
            self._stream = self._stream or self._file.open("ab", buffering=0)
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]
            self._has_failed = False
        except OSError as error:
            # Report the first failure only, not one per step.
            if not self._has_failed:
                log_to_stderr(
                    f"{self._file} cannot be written now ({error}); its lines are kept in memory"
                )
            self._has_failed = True

    def close(self) -> None:
        """Close the file, if anything was written."""
        if self._stream is not None:
            self._stream.close()


class MetricsLog:
    """Writes every step's metrics to the run folder before the next step begins.

    A failure to write never ends a run. W&B is started with the first line, so the first call that
    writes raises :class:`UserError` where :class:`WandbLog` does.

    Args:
        folder: The run folder; its files hold nothing of steps after ``step``.
        config: The run's config.
        step: Steps taken so far. TensorBoard's events of later steps, which a killed process took,
            are hidden.
    """

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        self._folder = folder
        self._config = config
        self._start_step = step
        self._metrics_file, self._evaluations_file, self._saves_file = (
            _JsonLinesFile(folder / name) for name in (METRICS, EVALUATIONS, SAVES)
        )
        self._tensorboard: Any = None
        self._wandb: WandbLog | None = None
        self._is_open = False

    def _open_trackers(self) -> None:
        """Start TensorBoard and W&B, once there is something to write.

        A start that takes no step must leave no trace. Besides, by then the metrics of later steps
        were dropped from the run folder, and the steps that W&B has of them were recorded there.
        """
        self._is_open = True
        if self._config.logging.wandb_project:
            self._wandb = WandbLog(self._folder, self._config)

        if self._config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self._folder / "tensorboard"), purge_step=self._start_step + 1
            )

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step, among them ``step``."""
        self._metrics_file.write(metrics)
        self._log_scalars(METRICS, metrics["step"], metrics)

    def write_evaluation(self, progress: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Record an evaluation.

        Args:
            progress: Costs of the run so far, among them ``step``.
            report: The evaluation's result; it goes under the key ``validation``.
        """
        self._evaluations_file.write({**progress, "validation": report})

        # Curves over approximate byte counts must not be mistaken for exact ones.
        mark = "approximate_" if report.get("bytes_note") else ""
        scalars = {
            f"validation/{mark if 'bits_per_byte' in name else ''}{name}": value
            for name, value in report.items()
            if isinstance(value, float)
        }
        self._log_scalars(EVALUATIONS, progress["step"], scalars)

    def write_save(self, saved: "SaveStats") -> None:
        """Record a completed checkpoint."""
        self._saves_file.write(asdict(saved))
        self._log_scalars(
            SAVES,
            saved.step,
            {f"checkpoint/{name}": value for name, value in asdict(saved).items()},
        )

    def _log_scalars(self, file: str, step: int, values: Mapping[str, Any]) -> None:
        """Send all values but None to TensorBoard and W&B."""
        if not self._is_open:
            self._open_trackers()

        scalars = {
            name: value for name, value in values.items() if value is not None and name != "step"
        }

        def add() -> None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)

        self._with_tensorboard(add)
        if self._wandb:
            self._wandb.send(file, step, scalars, fills_row=file == METRICS)

    def flush(self) -> None:
        """Flush TensorBoard's events, of which up to two minutes are buffered in memory.

        Call it before saving a checkpoint: the run that resumes from it repeats no earlier step, so
        events that were lost in memory would be missing for good.
        """
        self._with_tensorboard(lambda: self._tensorboard.flush())

    def _with_tensorboard(self, action: Callable[[], None]) -> None:
        """Run an action on TensorBoard's writer, if there is one; drop the writer if it fails."""
        if self._tensorboard is None:
            return

        try:
            action()
        except OSError as error:
            log_to_stderr(
                f"TensorBoard's events cannot be written ({error}); "
                "this process writes no more of them"
            )
            self._tensorboard = None

    def close(self) -> None:
        """Close all files and finish the W&B run."""
        for lines in (self._metrics_file, self._evaluations_file, self._saves_file):
            lines.close()
        self._with_tensorboard(lambda: self._tensorboard.close())
        if self._wandb:
            self._wandb.close()


class NullMetricsLog:
    """The :class:`MetricsLog` of ranks that keep no log: all calls are no-ops."""

    def write(self, metrics: Mapping[str, Any]) -> None:
        """No-op."""

    def write_evaluation(self, progress: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """No-op."""

    def write_save(self, saved: "SaveStats") -> None:
        """No-op."""

    def flush(self) -> None:
        """No-op."""

    def close(self) -> None:
        """No-op."""
