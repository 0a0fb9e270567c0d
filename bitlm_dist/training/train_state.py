"""Progress of a run, accumulated over all its restarts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bitlm_dist.training.step_pipeline import StepReport


@dataclass(frozen=True)
class TrainState:
    """What a run has done so far. A checkpoint's state.json has the fields under their names.

    Attributes:
        step: steps taken.
        tokens: positions trained on, including BOS blocks and padding.
        predicted_tokens: tokens that carried loss; None if the run was started by a version that
            did not count them.
        text_bytes: UTF-8 bytes of their text; None likewise.
        seconds: wall time spent in steps.
        cpu_seconds: CPU time of this process in steps.
        next_sequence: global index of the next sequence to be read.
    """

    step: int = 0
    tokens: int = 0
    predicted_tokens: int | None = 0
    text_bytes: int | None = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    next_sequence: int = 0

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any]) -> "TrainState":
        """The state that a checkpoint stores."""
        return cls(
            step=state["step"],
            tokens=state["tokens"],
            predicted_tokens=state.get("predicted_tokens"),
            text_bytes=state.get("text_bytes"),
            seconds=state["seconds"],
            cpu_seconds=state["cpu_seconds"],
            next_sequence=state["next_sequence"],
        )

    def after(self, report: StepReport, num_sequences: int, sequence_length: int) -> "TrainState":
        """The state after one more step.

        Args:
            report: the step's report.
            num_sequences: sequences of its global batch.
            sequence_length: tokens per sequence.
        """
        predicted, text = (int(count) for count in report.values["num_tokens_and_bytes"])
        return TrainState(
            step=self.step + 1,
            tokens=self.tokens + num_sequences * sequence_length,
            predicted_tokens=_sum(self.predicted_tokens, predicted),
            text_bytes=_sum(self.text_bytes, text),
            seconds=self.seconds + report.seconds,
            cpu_seconds=self.cpu_seconds + report.cpu_seconds,
            next_sequence=self.next_sequence + num_sequences,
        )

    def record(self) -> dict[str, Any]:
        """The fields of state.json."""
        return asdict(self)

    def progress(self) -> dict[str, Any]:
        """The counters that every line of the logs starts with."""
        counters = self.record()
        del counters["next_sequence"]
        return counters


def _sum(count: int | None, more: int) -> int | None:
    return None if count is None else count + more
