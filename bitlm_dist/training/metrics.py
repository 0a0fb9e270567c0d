"""Logs of a run: JSON lines in the run folder, TensorBoard, and Weights & Biases.

metrics.jsonl has one object per step, evaluations.jsonl one per evaluation, saves.jsonl one per
checkpoint, samples.jsonl one per evaluation with sample texts.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitlm_dist.config import Config
from bitlm_dist.errors import log_to_stderr, os_error_message
from bitlm_dist.formatting import plural
from bitlm_dist.strict_json import to_json
from bitlm_dist.training.evaluation_records import BY_TRAINING, EVALUATIONS, evaluation_record
from bitlm_dist.training.wandb_log import WandbLog

if TYPE_CHECKING:  # what reads these files alone needs no torch, which takes seconds to import
    from bitlm_dist.checkpoint.saver import SaveStats

METRICS = "metrics.jsonl"
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
            self._write_out()
            self._has_failed = False
        except OSError as error:
            # Report the first failure only, not one per step.
            if not self._has_failed:
                log_to_stderr(
                    f"{self._file} cannot be written now: {os_error_message(error)}; "
                    "its lines are kept in memory"
                )
            self._has_failed = True

    def _write_out(self) -> None:
        # Unbuffered: a killed process must not take lines with it, and an error shows here.
        self._stream = self._stream or self._file.open("ab", buffering=0)
        while self._unwritten:
            self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]

    def close(self) -> None:
        """Close the file, if anything was written; lines that do not fit even now are lost."""
        try:
            if self._unwritten:
                self._write_out()
            if self._stream is not None:
                self._stream.close()
        except OSError as error:
            # A network file system may tell only now that it did not take what was written.
            num_lost = self._unwritten.count(b"\n")
            what = f"lacks {plural(num_lost, 'line')}" if num_lost else "may lack lines"
            log_to_stderr(f"{self._file} {what}: {os_error_message(error)}")


class MetricsLog:
    """Writes every step's metrics to the run folder at once.

    A failure to write never ends a run, and one to close never hides another error. W&B is started
    before the first line, so the first call that writes raises :class:`UserError` where
    :class:`WandbLog` does, and has written nothing then.

    Args:
        folder: The run folder; its files hold nothing of steps after ``step``.
        config: The run's config.
        step: Steps taken so far. TensorBoard's events of later steps, which a killed process took,
            are hidden.
        before_first_line: Called before anything is written.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        step: int,
        before_first_line: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._config = config
        self._start_step = step
        self._files = {name: _JsonLinesFile(folder / name) for name in LOG_FILES}
        self._tensorboard: Any = None
        self._wandb: WandbLog | None = None
        self._before_first_line = before_first_line
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

            _silence_tensorboard_threads()
            with self._dropping_failed_tensorboard():
                self._tensorboard = SummaryWriter(
                    str(self._folder / "tensorboard"), purge_step=self._start_step + 1
                )

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step, among them ``step``. Lists are several scalars."""
        scalars = {
            name: value
            for key, values in metrics.items()
            for name, value in (
                ((f"{key}/{number}", each) for number, each in enumerate(values))
                if isinstance(values, list)
                else ((key, values),)
            )
        }
        self._record(METRICS, metrics, scalars)

    def write_evaluation(self, progress: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Record an evaluation.

        Args:
            progress: Costs of the run so far, among them ``step``.
            report: The evaluation's result; it goes under the key ``validation``, except for its
                field ``scored``, which says what was scored.
        """
        line = evaluation_record(progress, report, BY_TRAINING)

        # Curves over approximate byte counts must not be mistaken for exact ones.
        mark = "approximate_" if report.get("bytes_note") else ""
        scalars = {
            f"validation/{mark if 'bits_per_byte' in name else ''}{name}": value
            for name, value in report.items()
            if isinstance(value, float)
        }
        self._record(EVALUATIONS, line, scalars)

    def write_save(self, saved: "SaveStats") -> None:
        """Record a completed checkpoint."""
        line = asdict(saved)
        self._record(SAVES, line, {f"checkpoint/{name}": value for name, value in line.items()})

    def write_samples(
        self, progress: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
    ) -> None:
        """Record texts that the model has written, each with ``prompt`` and ``text``."""
        step = progress["step"]
        line = {"step": step, "tokens": progress["tokens"], "time": time.time(), "samples": samples}
        self._record(SAMPLES, line, {})

        texts = [sample["prompt"] + sample["text"] for sample in samples]
        # Indented, Markdown shows a text as it is.
        indented = "\n\n---\n\n".join("    " + text.replace("\n", "\n    ") for text in texts)
        self._with_tensorboard(lambda: self._tensorboard.add_text("samples", indented, step))
        if self._wandb:
            self._wandb.send_texts(SAMPLES, step, "samples", texts)

    def _record(self, file: str, line: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
        """Append a line to a file, and send all scalars but None to TensorBoard and W&B."""
        if not self._is_open:
            self._before_first_line()
            self._open_trackers()
        self._files[file].write(line)

        # TensorBoard and W&B have their own clocks.
        step = line["step"]
        sent = {
            name: value
            for name, value in scalars.items()
            if value is not None and name not in ("step", "time")
        }

        def add() -> None:
            for name, value in sent.items():
                self._tensorboard.add_scalar(name, value, step)

        self._with_tensorboard(add)
        if self._wandb:
            self._wandb.send(file, step, sent, fills_row=file == METRICS)

    def flush(self) -> None:
        """Flush TensorBoard's events, of which up to two minutes are buffered in memory.

        Call it before saving a checkpoint: the run that resumes from it repeats no earlier step, so
        events that were lost in memory would be missing for good.
        """
        self._with_tensorboard(lambda: self._tensorboard.flush())

    def _with_tensorboard(self, action: Callable[[], None]) -> None:
        """Run an action on TensorBoard's writer, if there is one; drop the writer if it fails."""
        if self._tensorboard is not None:
            with self._dropping_failed_tensorboard():
                action()

    @contextmanager
    def _dropping_failed_tensorboard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log_to_stderr(
                f"TensorBoard's events cannot be written: {os_error_message(error)}; "
                "this process writes no more of them"
            )
            self._tensorboard = None

    def close(self) -> None:
        """Close all files and finish the W&B run."""
        for lines in self._files.values():
            lines.close()
        self._with_tensorboard(lambda: self._tensorboard.close())
        if self._wandb:
            self._wandb.close()


def _silence_tensorboard_threads() -> None:
    """Keep TensorBoard's thread from printing a traceback of what it cannot write.

    The thread keeps the error, and handing over the next events raises it again, to be reported.
    """
    print_traceback = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        """Print the failure of a thread, unless TensorBoard's could not write."""
        is_tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
        if not (is_tensorboard and issubclass(failure.exc_type, OSError)):
            print_traceback(failure)

    if getattr(print_traceback, "__module__", "") != __name__:
        threading.excepthook = hook


class NullMetricsLog:
    """The :class:`MetricsLog` of ranks that keep no log: all calls are no-ops."""

    def write(self, metrics: Mapping[str, Any]) -> None:
        """No-op."""

    def write_evaluation(self, progress: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """No-op."""

    def write_save(self, saved: "SaveStats") -> None:
        """No-op."""

    def write_samples(
        self, progress: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
    ) -> None:
        """No-op."""

    def flush(self) -> None:
        """No-op."""

    def close(self) -> None:
        """No-op."""
