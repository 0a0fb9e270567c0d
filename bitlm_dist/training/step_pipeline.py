"""Steps that overlap: the host prepares the next one while the device computes.

Nothing in a step waits for the device. What a step reports is read after the next one was launched.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite

from torch import Tensor

from bitlm_dist.model.batch import Batch
from bitlm_dist.recording import take_records
from bitlm_dist.training.agreement import Agreement
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.memory_advice import advising_on_memory
from bitlm_dist.training.readback import DeviceReadback, Moment
from bitlm_dist.training.recorder import Recorder


@dataclass(frozen=True)
class TimedBatch:
    """The sequences of this data-parallel rank, and what it took to get them."""

    batch: Batch
    began: Moment  # when the step began to wait for them
    wait_seconds: float


@dataclass(frozen=True)
class StepReport:
    """What the host knows of a step that is complete.

    Attributes:
        values: elements of each tensor of :class:`~bitlm_dist.training.engine.StepResult` by name,
            and as ``flags`` those for :meth:`Agreement.result`.
        recorded: values of :func:`~bitlm_dist.recording.record` by name, over all ranks.
        lr_multiplier: learning rates as a fraction of their peaks.
        data_wait_seconds: how long the step waited for its batch.
        completed: when the host saw that it was complete.
        seconds: wall time since the step before was complete, or since the step began.
        cpu_seconds: CPU time of this process in the same span.
    """

    values: Mapping[str, list[float]]
    recorded: Mapping[str, float]
    lr_multiplier: float
    data_wait_seconds: float
    completed: Moment
    seconds: float
    cpu_seconds: float

    @property
    def loss(self) -> float:
        """Mean over the predicted tokens of the global batch."""
        return self.values["loss"][0]

    @property
    def grad_norm(self) -> float:
        """Gradient norm before clipping."""
        return self.values["grad_norm"][0]

    @property
    def is_finite(self) -> bool:
        """True if loss and gradient norm are finite."""
        return isfinite(self.loss) and isfinite(self.grad_norm)


@dataclass(frozen=True)
class _LaunchedStep:
    began: Moment
    data_wait_seconds: float
    lr_multiplier: float
    readback: DeviceReadback


class StepPipeline:
    """Launches steps and reads their reports. Collective, in the same order on all ranks.

    Args:
        engine: takes the steps.
        agreement: what all ranks agree on with every step.
    """

    def __init__(self, engine: Engine, agreement: Agreement) -> None:
        self._engine = engine
        self._agreement = agreement
        self._recorder = Recorder(engine.layout)
        self._launched: deque[_LaunchedStep] = deque()
        self._last_completed: Moment | None = None

    def __len__(self) -> int:
        """Number of steps that were launched and not read."""
        return len(self._launched)

    def launch(self, timed: TimedBatch, step: int) -> None:
        """Launch a step.

        Args:
            timed: the batch.
            step: index of the step.

        Raises:
            UserError: the device is out of memory in the first step of this process.
            RuntimeError: it is out of memory in a later step.
        """
        take_records()  # evaluations record, too
        is_first_step = not self._launched and self._last_completed is None
        with advising_on_memory(self._engine, is_first_step):
            result = self._engine.train_step(timed.batch, step)

        tensors = {f.name: getattr(result, f.name) for f in fields(result)}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        tensors["flags"] = self._agreement.start()
        tensors["recorded"] = self._recorder.start()
        readback = DeviceReadback(tensors)
        self._launched.append(
            _LaunchedStep(timed.began, timed.wait_seconds, result.lr_multiplier, readback)
        )

    def read(self) -> StepReport:
        """Wait for the oldest launched step, and return its report."""
        step = self._launched.popleft()
        values, completed = step.readback.read()
        last = self._last_completed or step.began
        self._last_completed = completed

        # Steps overlap, but each second counts once. After a pause the step's own start counts.
        return StepReport(
            values,
            self._recorder.result(values["recorded"]),
            step.lr_multiplier,
            step.data_wait_seconds,
            completed,
            seconds=completed.seconds - max(last.seconds, step.began.seconds),
            cpu_seconds=completed.cpu_seconds - max(last.cpu_seconds, step.began.cpu_seconds),
        )
