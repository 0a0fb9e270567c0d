"""A run folder as the launcher leaves it, without any process."""

import json
import os
from pathlib import Path

import pytest

from bitlm_dist.config_loading import with_absolute_paths
from bitlm_dist.launch import attempts, supervisor


class LaunchedRun:
    """Run folder of `bitlm launch local`, with methods that write what ranks and launcher write."""

    def __init__(self, folder):
        self.folder = folder

    def start(self):
        return Path(supervisor.start_attempt(self.folder, [os.uname().nodename])[0])

    def train(self, first, last, seconds_per_step=0.5, **metrics):
        """Append the metrics of steps, as a rank 0 that resumed after ``first`` does."""
        file = self.folder / "metrics.jsonl"
        old = file.read_text().splitlines()[:first] if file.is_file() else []
        for step in range(first + 1, last + 1):
            counters = {"tokens": 100 * step, "predicted_tokens": 90 * step}
            record = {"step": step, **counters, "seconds": seconds_per_step * step, "loss": 2.0}
            old.append(json.dumps({**record, **metrics}))
        file.write_text("".join(line + "\n" for line in old))

    def save(self, step):
        folder = self.folder / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    def end(self, outcome, reason, seconds=10.0):
        """End the latest attempt, which then has taken some seconds."""
        attempt = attempts.read_attempts(self.folder)[-1]
        attempts.record_end(self.folder, attempt, outcome, reason)
        file = attempts.attempt_folder(self.folder, attempt.number) / "end.json"
        record = json.loads(file.read_text())
        file.write_text(json.dumps({**record, "ended": attempt.began + seconds}))


@pytest.fixture
def launched(tiny):
    """A run of the tiny config that was launched locally with two ranks."""
    from bitlm_dist.launch.cluster import Cluster
    from bitlm_dist.launch.job_files import write_job_files
    from bitlm_dist.launch.render import Job

    config = with_absolute_paths(tiny("--training.steps", "100"))
    cluster = Cluster(tasks_per_node=2, env={"A": "b"})
    job = Job(config.run.dir, (), 1, cluster)
    write_job_files(job, config, is_local=True)
    return LaunchedRun(config.run.dir)
