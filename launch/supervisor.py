"""Supervisor commands called by the batch script:
`python -m bitlm_dist.launch.supervisor start-attempt|check-nodes|finish-attempt|excluded`.

The answer is printed as lines for bash's `mapfile`. On an error the exit code is 2, with one line
on standard error. This module uses only the standard library.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bitlm_dist.errors import USER_ERROR_EXIT_CODE, UserError, log_to_stderr, os_error_message
from bitlm_dist.files import write_atomically
from bitlm_dist.formatting import format_time
from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import LAUNCH, Attempt, Limits
from bitlm_dist.launch.disk_room import full_disk
from bitlm_dist.launch.next_action import Action, NextAction, next_action
from bitlm_dist.launch.node_health import bad_nodes
from bitlm_dist.launch.outcomes import outcome_of
from bitlm_dist.strict_json import to_json

SETTINGS = "settings.json"
EXCLUDED = "excluded.json"

# range of ports for the ranks' rendezvous
FIRST_PORT = 15_000
NUM_PORTS = 15_000
MAX_BACKOFF_SECONDS = 300.0  # longest wait between a failure and the next attempt


class Decision(NamedTuple):
    """An attempt that has ended, the action that follows, and the seconds to wait before it."""

    attempt: Attempt
    next: NextAction
    wait: float


def load_settings(run: Path) -> dict[str, Any]:
    """Load the settings that the submitting command wrote for the job."""
    settings: dict[str, Any] = json.loads((run / LAUNCH / SETTINGS).read_text())
    return settings


def excluded_nodes(run: Path) -> list[str]:
    """Nodes that no job of the run may use: those excluded by the user, and those found bad."""
    return sorted({*load_settings(run)["exclude"], *_load_bad_nodes(run)})


def _load_bad_nodes(run: Path) -> list[str]:
    file = run / LAUNCH / EXCLUDED
    return list(json.loads(file.read_text())) if file.is_file() else []


def start_attempt(run: Path, nodes: list[str], job: str = "", restart: int = 0) -> list[str]:
    """Create the next attempt.

    Returns:
        The attempt folder, and address and port of the ranks' rendezvous.
    """
    settings = load_settings(run)
    folder = attempts.create_attempt(
        run, job, restart, nodes, Limits.from_record(settings["limits"]), settings["submission"]
    )

    # jobs on the same node, and restarts whose sockets still linger, must not meet
    port = FIRST_PORT + (int(job or os.getpid()) * 97 + int(folder.name)) % NUM_PORTS
    return [str(folder), nodes[0], str(port)]


def check_hostname(node: str) -> None:
    """Check that a host name resolves.

    Otherwise each rank would fall back to its own host and form a world of size one.

    Raises:
        UserError: the name does not resolve.
    """
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        raise UserError(
            f"the name of the first node, {node}, does not resolve on {socket.gethostname()}"
        ) from None


def check_nodes(folder: Path) -> list[str]:
    """Judge the preflight measurements; exclude broken and slow nodes from now on.

    If most nodes look bad, the cause lies elsewhere: no node is excluded and the attempt fails.

    Args:
        folder: the attempt folder.

    Returns:
        ``go``, or ``bad`` if the attempt has ended.
    """
    run = attempts.run_folder_of(folder)
    attempt = attempts.read_attempt(folder)
    bad = bad_nodes(folder / "nodes", attempt.nodes, load_settings(run)["preflight"])
    if not bad or (folder / "stop").is_file():
        return ["go"]

    reason = "; ".join(f"{node}: {why}" for node, why in bad.items())
    outcome, words = outcome_of(folder, 0)
    refused = outcome == attempts.Outcome.REFUSED

    # of two nodes, a single bad one is half, and may still be excluded
    if 2 * len(bad) >= len(attempt.nodes) and (len(bad) > 1 or refused):
        attempts.record_end(
            run,
            attempt,
            outcome,
            words if refused else f"most nodes look bad, so none is left out: {reason}",
        )
        return ["bad"]

    write_atomically(run / LAUNCH / EXCLUDED, to_json(sorted({*_load_bad_nodes(run), *bad})) + "\n")
    attempts.record_end(run, attempt, attempts.Outcome.BAD_NODES, reason)
    return ["bad"]


def decide(folder: Path, exit_code: int) -> Decision:
    """Record the end of an attempt whose ranks have exited, and decide what follows.

    The wait before a restart in the same allocation doubles with every failure without a new
    checkpoint: the batch system may still be finding out that a node is dead, or the user may be
    making room on a disk.

    Args:
        folder: the attempt folder.
        exit_code: of the command that ran the ranks.
    """
    run = attempts.run_folder_of(folder)
    attempt = attempts.read_attempt(folder)
    settings = load_settings(run)

    # check_nodes may have ended it already
    if not attempt.outcome:
        attempts.record_end(run, attempt, *outcome_of(folder, exit_code))

    # a late launcher must decide on its own attempt, not on one that has begun since
    past_attempts = [
        other for other in attempts.read_attempts(run) if other.number <= attempt.number
    ]
    decision = next_action(
        past_attempts, settings["max_restarts"], attempts.is_cancelled(run), excluded_nodes(run)
    )

    # the disk stays full if the ranks start again at once
    num_failures = decision.num_without_progress or int(full_disk(decision.reason) is not None)
    wait = (
        min(MAX_BACKOFF_SECONDS, settings["pause"] * 2 ** (num_failures - 1)) if num_failures else 0
    )
    return Decision(past_attempts[-1], decision, wait)


def finish_attempt(folder: Path, exit_code: int) -> list[str]:
    """Record the end of an attempt and report on standard error, see :func:`decide`.

    Returns:
        The action, its reason, the nodes to exclude (comma-separated), and the seconds to wait.
    """
    attempt, decision, wait = decide(folder, exit_code)

    outcome = f"{attempt.outcome}: {attempt.reason}"
    _log(f"attempt {attempt.number}: {outcome}; {decision.action}")
    if decision.action == Action.GIVE_UP:
        _log(decision.reason)

    return [decision.action, decision.reason, ",".join(decision.exclude), f"{wait:.0f}"]


def _log(text: str) -> None:
    print(f"{format_time()} bitlm: {text}", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    command, path, *rest = sys.argv[1:]
    try:
        if command == "start-attempt":
            check_hostname(rest[0])
            restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            lines = start_attempt(Path(path), rest, os.environ.get("SLURM_JOB_ID", ""), restart)
        elif command == "check-nodes":
            lines = check_nodes(Path(path))
        elif command == "excluded":
            lines = [",".join(excluded_nodes(Path(path)))]
        else:
            assert command == "finish-attempt"
            lines = finish_attempt(Path(path), int(rest[0]))
    except (UserError, OSError) as error:
        log_to_stderr(os_error_message(error) if isinstance(error, OSError) else str(error))
        sys.exit(USER_ERROR_EXIT_CODE)

    print("\n".join(lines))


if __name__ == "__main__":
    main()
