"""Whom training tells what happens: the logs of the run, and the display."""

from dataclasses import dataclass, field

from bitlm_dist.training.display import NoDisplay, TrainingDisplay
from bitlm_dist.training.metrics import MetricsLog, NullMetricsLog


@dataclass
class Reporter:
    """The log and the display of the current call of :meth:`Trainer.fit`."""

    log: MetricsLog | NullMetricsLog = field(default_factory=NullMetricsLog)
    display: TrainingDisplay = field(default_factory=NoDisplay)
