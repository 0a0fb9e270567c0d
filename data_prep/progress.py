"""Progress of a preparation, phase by phase."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a preparation.

    Attributes:
        phase: Name of the current phase.
        done: Bytes of the input files, as stored, that are finished in this phase.
        total: Bytes of all input files, as stored; 0: unknown, or the phase cannot tell how far it
            is.
        text_bytes: Bytes of text that are finished in this phase.
        num_documents: The same in documents.
    """

    phase: str
    done: int = 0
    total: int = 0
    text_bytes: int = 0
    num_documents: int = 0


ProgressCallback = Callable[[Progress], None]
NotifyCallback = Callable[[str], None]
