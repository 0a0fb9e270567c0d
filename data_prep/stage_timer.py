"""CPU time by stage, measured per thread."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class StageTimer:
    """Sums CPU ``seconds`` by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Attribute the CPU time of this thread inside the context to ``stage``."""
        start = time.thread_time()
        try:
            yield
        finally:
            self.seconds[stage] += time.thread_time() - start

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of another timer."""
        for stage, value in seconds.items():
            self.seconds[stage] += value
