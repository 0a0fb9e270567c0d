"""Slurm's commands, asked in one place; errors are one line."""

import re
import shutil
import subprocess
from pathlib import Path

from bitlm_dist.launch.cluster import seconds_of

from bitlm_dist.errors import UserError

SECONDS = 60.0  # for any answer
NOISE = re.compile(r"^(sbatch|scontrol|scancel|squeue): (error: )?")
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")


def ask(*words: str) -> str:
    """What a command prints.

    Raises:
        UserError: it is not installed, says no, or does not answer.
    """
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]} is not on the path: launch from a login node of a Slurm cluster, or use `bitlm launch local`")
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} gave no answer for {SECONDS:.0f} s: is Slurm's controller up?") from None
    if answer.returncode:
        lines = [NOISE.sub("", line) for line in answer.stderr.splitlines() if line.strip()]
        raise UserError(f"{words[0]}: {'; '.join(lines) or f'exit code {answer.returncode}'}")
    return answer.stdout


def test(script: Path) -> None:
    """Have Slurm judge a script without queueing it; it takes some that never start, see :func:`check_time`.

    Raises:
        UserError: what it does not like.
    """
    ask("sbatch", "--test-only", str(script))


def check_time(partition: str | None, seconds: int) -> None:
    """Compare a walltime with the partition's limit, which sbatch does not.

    Raises:
        UserError: it is beyond.
    """
    for line in ask("scontrol", "show", "partition", "-o").splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        chosen = fields.get("PartitionName") == partition if partition else fields.get("Default") == "YES"
        limit = seconds_of(fields.get("MaxTime", ""))
        if chosen and limit is not None and seconds > limit:
            raise UserError(f"time is above the {fields['MaxTime']} that partition {fields['PartitionName']} allows: lower --time")


def submit(script: Path, *options: str) -> str:
    """Queue a script -> the job's number."""
    return ask("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]


def cancel(job: str, *options: str) -> None:
    """End a job, or send it a signal."""
    ask("scancel", *options, job)


def show(job: str) -> dict[str, str]:
    """What Slurm knows of a job: scontrol's words, else sacct's state; empty where it is forgotten."""
    try:
        line = ask("scontrol", "show", "job", "-o", job)
    except UserError:
        return _from_accounting(job)
    return dict(word.partition("=")[::2] for word in line.split())


def _from_accounting(job: str) -> dict[str, str]:
    try:
        answer = ask("sacct", "-X", "-n", "-P", "-o", "State,Restarts,End", "-j", job)
    except UserError:  # no accounting
        return {}
    state, restarts, end = (answer.splitlines() or ["||"])[-1].split("|")[:3]
    return {"JobState": state.partition(" ")[0], "Restarts": restarts, "EndTime": end} if state else {}
