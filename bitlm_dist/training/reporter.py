"""Where training reports what happens: the logs of the run, and the display."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from bitlm_dist.config import Config
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.display import NoDisplay, TrainingDisplay
from bitlm_dist.training.metrics import MetricsLog, NullMetricsLog
from bitlm_dist.training.run_folder import RunFolder


class Reporter:
    """The log and the display of a rank.

    Args:
        config: the run's config.
        layout: the job's parallel layout; rank 0 alone keeps a log.

    Attributes:
        log: takes metrics, evaluations, saves and sample texts.
        display: shows the phases between steps.
    """

    def __init__(self, config: Config, layout: ParallelLayout) -> None:
        self._config = config
        self._keeps_log = layout.rank == 0
        self.log: MetricsLog | NullMetricsLog = NullMetricsLog()
        self.display: TrainingDisplay = NoDisplay()

    @contextmanager
    def reporting(self, folder: RunFolder, step: int, display: TrainingDisplay) -> Iterator[None]:
        """Context in which the log is open.

        Args:
            folder: the run folder.
            step: steps taken so far.
            display: the display.
        """
        self.display = display
        if self._keeps_log:
            self.log = MetricsLog(folder.path, self._config, step, partial(folder.begin, step))
        try:
            yield
        finally:
            self.log.close()
