"""What training tells the one who watches it, besides the metrics of each step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

# The phases between steps.
EVALUATING = "evaluating"
SAVING = "saving"


class TrainingDisplay(Protocol):
    """Shows the phases between steps, and what comes out of them."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Context of work that is no step: EVALUATING or SAVING."""
        ...

    def show_evaluation(
        self, step: int, report: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
    ) -> None:
        """Show the scores of a step, and the texts that the model wrote."""
        ...


class NoDisplay:
    """Shows nothing, as on all ranks but the first."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """No-op."""
        return nullcontext()

    def show_evaluation(
        self, step: int, report: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
    ) -> None:
        """No-op."""
