"""Progress of `bitlm train`: a bar on a terminal, otherwise a line with the time now and then."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from bitlm_dist.cli import progress
from bitlm_dist.config import Config
from bitlm_dist.formatting import format_duration, format_time, format_value
from bitlm_dist.training.display import EVALUATING, SAVING

NUM_RECENT_STEPS = 50  # of which the mean time predicts that of the remaining steps
MAX_SAMPLE_CHARACTERS = 240  # of a sample text that is shown; samples.jsonl has all of it


class TimeLeft:
    """Estimates how long the rest of a run takes: its steps, evaluations and saves.

    Args:
        num_steps: steps of the whole run.
        every_steps: how often each phase comes; 0: only at the end, or never.
    """

    def __init__(self, num_steps: int, every_steps: Mapping[str, int]) -> None:
        self._num_steps = num_steps
        self._every_steps = every_steps
        self._step = 0
        self._step_seconds: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self._phase_seconds: dict[str, list[float]] = {}
        self._updated = time.monotonic()

    def record_step(self, step: int, seconds: float | None) -> None:
        """Record a step and its duration; None: the duration says nothing about other steps."""
        self._step = step
        self._updated = time.monotonic()
        if seconds is not None:
            self._step_seconds.append(seconds)

    def record_phase(self, name: str, seconds: float) -> None:
        """Record how long an evaluation or a save took."""
        self._phase_seconds.setdefault(name, []).append(seconds)
        self._updated = time.monotonic()

    @property
    def seconds(self) -> float | None:
        """Seconds from now to the end; None as long as nothing tells."""
        if not self._step_seconds:
            return None

        num_steps = self._num_steps - self._step
        left = num_steps * sum(self._step_seconds) / len(self._step_seconds)
        # a phase that was not seen yet takes nobody knows how long
        for name, past in self._phase_seconds.items():
            left += self._num_phases_left(name) * sum(past) / len(past)
        return max(0.0, left - (time.monotonic() - self._updated))

    def _num_phases_left(self, name: str) -> int:
        every = self._every_steps.get(name, 0)
        if not every:
            return 0
        periodic = self._num_steps // every - self._step // every
        # there is one more at the end, if the last step is no periodic one
        is_one_at_end = self._num_steps % every != 0 and self._step < self._num_steps
        return periodic + is_one_at_end


class TrainingProgress:
    """What is common to both displays: times, and the scores of evaluations.

    An instance is called with the metrics of each step. It is a
    :class:`~bitlm_dist.training.display.TrainingDisplay`.

    Args:
        console: where to print.
        config: config of the run.
    """

    def __init__(self, console: Console, config: Config) -> None:
        self._console = console
        self._num_steps = config.training.steps
        self._time_left = TimeLeft(
            self._num_steps,
            {EVALUATING: config.evaluation.every_steps, SAVING: config.checkpoint.every_steps},
        )
        self._seconds_in_steps: float | None = None  # of the run, as of its last step
        self._last_scores: dict[str, float] = {}  # by unit

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a step."""
        before = self._seconds_in_steps
        self._seconds_in_steps = metrics["seconds"]
        # the first step of a process is slower than all others
        self._time_left.record_step(
            metrics["step"], None if before is None else metrics["seconds"] - before
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context of an evaluation or a save."""
        start_time = time.monotonic()
        yield
        self._time_left.record_phase(name, time.monotonic() - start_time)

    def show_evaluation(
        self, step: int, report: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
    ) -> None:
        """Print the score of a step, how it changed, and the first of the sample texts."""
        score = report.get("bits_per_byte")
        unit = "bits per byte"
        if report.get("bytes_note"):
            unit = f"approximate {unit}"
        if score is None:
            score = report.get("nats_per_token")
            unit = "nats per token"

        notes = ["exact" if report.get("exact") else "bound"]
        if score is not None:
            if unit in self._last_scores:
                notes.append(f"{score - self._last_scores[unit]:+.3f}".replace("-", "−"))
            self._last_scores[unit] = score
        value = format_value(score, "{:.3f}")
        self.print_line(f"step {step:,}: validation {value} {unit} ({'; '.join(notes)})")

        if samples:
            prompt, text = (" ".join(samples[0][name].split()) for name in ("prompt", "text"))
            if len(text) > MAX_SAMPLE_CHARACTERS:
                text = text[:MAX_SAMPLE_CHARACTERS] + "…"
            self.print_line(f"  {prompt or '(no prompt)'} → {text}")

    def print_line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False)

    def duration_left(self) -> str:
        """The time left, as text."""
        seconds = self._time_left.seconds
        return "–" if seconds is None else format_duration(seconds)


class _Lines(TrainingProgress):
    """A line for the first step, every 30 seconds, and for the last step; each with the time."""

    _last_time = float("-inf")  # of the last line

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Print a line if one is due."""
        super().__call__(metrics)
        now = time.monotonic()
        is_last = metrics["step"] == self._num_steps
        if now - self._last_time < progress.PLAIN_LOG_SECONDS and not is_last:
            return

        self._last_time = now
        values = {
            name: format_value(metrics[name], pattern)
            for name, pattern in (
                ("loss", "{:.4f}"),
                ("grad_norm", "{:.3f}"),
                ("tokens_per_second", "{:,.0f}"),
                ("predicted_tokens_per_second", "{:,.0f}"),
            )
        }
        self.print_line(
            f"step {metrics['step']}/{self._num_steps}  loss {values['loss']}  "
            f"grad norm {values['grad_norm']}  {values['tokens_per_second']} tokens/s, "
            f"{values['predicted_tokens_per_second']} of them predicted"
            + ("" if is_last else f"  left {self.duration_left()}")
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Print a line for every 30 seconds that an evaluation or a save takes."""
        is_over = Event()
        Thread(target=self._report_phase, args=(name, is_over), daemon=True).start()
        try:
            with super().phase(name):
                yield
        finally:
            is_over.set()

    def _report_phase(self, name: str, is_over: Event) -> None:
        start_time = time.monotonic()
        while not is_over.wait(progress.PLAIN_LOG_SECONDS):
            self.print_line(f"{name} for {format_duration(time.monotonic() - start_time)}")

    def print_line(self, text: str) -> None:
        """Print a line with the time in front; a full disk does not end the run."""
        try:
            print(f"{format_time()} {text}", file=self._console.file, flush=True)
        except BrokenPipeError:
            self._console.on_broken_pipe()
        except OSError:  # the file has the line when there is room again
            pass


class _Bar(TrainingProgress):
    """A bar, which says what goes on between the steps."""

    def __init__(self, console: Console, config: Config, bar: Progress, task: TaskID) -> None:
        super().__init__(console, config)
        self._bar = bar
        self._task = task

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Move the bar."""
        super().__call__(metrics)
        self._bar.update(
            self._task,
            completed=metrics["step"],
            loss=format_value(metrics["loss"]),
            rate=format_value(metrics["tokens_per_second"], "{:,.0f}"),
            predicted=format_value(metrics["predicted_tokens_per_second"], "{:,.0f}"),
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Have the bar name an evaluation or a save while it lasts."""
        self._bar.update(self._task, description=name)
        self._bar.refresh()
        try:
            with super().phase(name):
                yield
        finally:
            self._bar.update(self._task, description="step")


class _TimeLeftColumn(TextColumn):
    """The estimate of the display, which counts down between its updates."""

    def __init__(self) -> None:
        super().__init__("left")
        self.display: TrainingProgress | None = None

    def render(self, task: Any) -> Any:
        """The remaining time as text."""
        self.text_format = f"left {self.display.duration_left() if self.display else '–'}"
        return super().render(task)


@contextmanager
def training_progress(
    console: Console, config: Config, start_step: int
) -> Iterator[TrainingProgress]:
    """Show the progress of training: a bar on a terminal, otherwise a line now and then.

    Two rates are shown: tokens per second counts all positions, as memory and FLOPs do; predicted
    tokens are those that the model learns from.

    Args:
        console: where to print.
        config: config of the run.
        start_step: steps that were taken before.
    """
    if not console.is_interactive:
        yield _Lines(console, config)
        return

    left = _TimeLeftColumn()
    # each from the width on at which it fits beside those that matter more
    widths_and_columns = (
        (0, TextColumn("{task.description}")),
        (0, MofNCompleteColumn()),
        (60, BarColumn()),
        (0, TextColumn("loss {task.fields[loss]}")),
        (80, TextColumn("{task.fields[rate]} tokens/s")),
        (100, TextColumn("{task.fields[predicted]} predicted")),
        (70, TimeElapsedColumn()),
        (50, left),
    )
    columns = (column for width, column in widths_and_columns if console.width >= width)
    with Progress(*columns, console=console) as bar:
        # there is no loss or rate to show before the first step
        task = bar.add_task(
            "step",
            total=config.training.steps,
            completed=start_step,
            loss="–",
            rate="–",
            predicted="–",
        )
        display = _Bar(console, config, bar, task)
        left.display = display
        yield display
