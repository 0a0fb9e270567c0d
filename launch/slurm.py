"""Slurm's commands; every error is a UserError of one line."""

import re
import shutil
import subprocess
from pathlib import Path

from bitlm_dist.errors import UserError
from bitlm_dist.launch.cluster import parse_walltime

COMMAND_TIMEOUT = 60.0  # seconds, for every command
ERROR_PREFIX = re.compile(r"^(sbatch|scontrol|scancel|squeue): (error: )?")
# what Slurm's commands say where they find no cluster
NO_CLUSTER_SIGNS = ("configuration source", "Unable to contact slurm controller")
WHERE_TO_LAUNCH = "launch from a login node of a Slurm cluster, or use `bitlm launch local`"
TERMINAL_STATES = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)


def run_command(*words: str) -> str:
    """Run a command and return its output.

    Raises:
        UserError: the command is not installed, fails, or does not answer in time.
    """
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]} is not on the path: {WHERE_TO_LAUNCH}")

    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} gave no answer for {COMMAND_TIMEOUT:.0f} s: is Slurm's controller up?"
        ) from None

    if answer.returncode and any(sign in answer.stderr for sign in NO_CLUSTER_SIGNS):
        raise UserError(f"{words[0]} finds no Slurm controller here: {WHERE_TO_LAUNCH}")

    # the message names the command already, so its own prefix is dropped
    if answer.returncode:
        lines = [ERROR_PREFIX.sub("", line) for line in answer.stderr.splitlines() if line.strip()]
        raise UserError(f"{words[0]}: {'; '.join(lines) or f'exit code {answer.returncode}'}")

    return answer.stdout


def validate_script(script: Path) -> None:
    """Let Slurm check a script without queueing it.

    Slurm accepts some scripts whose jobs never start, see :func:`check_walltime`.

    Raises:
        UserError: Slurm refuses the script.
    """
    run_command("sbatch", "--test-only", str(script))


def check_walltime(partition: str | None, seconds: int) -> None:
    """Compare a walltime with the partition's limit, which sbatch does not do.

    Raises:
        UserError: the walltime exceeds the limit.
    """
    for line in run_command("scontrol", "show", "partition", "-o").splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        chosen = (
            fields.get("PartitionName") == partition
            if partition
            else fields.get("Default") == "YES"
        )

        # UNLIMITED is no walltime and parses to None
        limit = parse_walltime(fields.get("MaxTime", ""))
        if chosen and limit is not None and seconds > limit:
            raise UserError(
                f"time is above the {fields['MaxTime']} that partition {fields['PartitionName']} "
                "allows: lower --time"
            )


def submit_script(script: Path, *options: str) -> str:
    """Queue a script and return the job id."""
    return run_command("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]


def cancel_job(job: str, *options: str) -> None:
    """Cancel a job, or send it a signal."""
    run_command("scancel", *options, job)


def show_job(job: str) -> dict[str, str]:
    """Look up a job in scontrol, else in the accounting database.

    Returns:
        Fields as scontrol names them; empty if Slurm no longer knows the job.
    """
    # scontrol forgets jobs some minutes after their end
    try:
        line = run_command("scontrol", "show", "job", "-o", job)
    except UserError:
        return _from_accounting(job)

    return dict(word.partition("=")[::2] for word in line.split())


def _from_accounting(job: str) -> dict[str, str]:
    try:
        answer = run_command("sacct", "-X", "-n", "-P", "-o", "State,Restarts,End", "-j", job)
    except UserError:  # the cluster has no accounting
        return {}

    # the state may be "CANCELLED by UID"
    state, restarts, end = (answer.splitlines() or ["||"])[-1].split("|")[:3]
    return (
        {"JobState": state.partition(" ")[0], "Restarts": restarts, "EndTime": end} if state else {}
    )
