"""Where the processor's time goes: CPU seconds of each stage, of the thread that runs it."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Adds up CPU ``seconds`` by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what this thread does inside for ``stage``."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.seconds[stage] += time.thread_time() - began

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what another clock counted."""
        for stage, value in seconds.items():
            self.seconds[stage] += value
