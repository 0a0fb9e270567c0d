"""What a batch script asks: `python -m bitlm_dist.launch.agent begin|judge|decide|left_out`; answers are lines for `mapfile`.

It needs the standard library alone. Exit code 2 and a line on standard error: what was asked cannot be done.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import LAUNCH, Limits
from bitlm_dist.launch.verdicts import bad_nodes

from bitlm_dist.errors import UserError
from bitlm_dist.files import to_json, write_atomically

SETTINGS, EXCLUDED = "settings.json", "excluded.json"
FIRST_PORT, PORTS = 15_000, 15_000
LONGEST_PAUSE = 300.0  # seconds between a failure and the next try


def settings_of(run: Path) -> dict[str, Any]:
    """What the submitting command left for the job."""
    found: dict[str, Any] = json.loads((run / LAUNCH / SETTINGS).read_text())
    return found


def left_out(run: Path) -> list[str]:
    """Nodes that no job of the run is to use: those of the user, and those that were found bad."""
    return sorted({*settings_of(run)["exclude"], *_found_bad(run)})


def _found_bad(run: Path) -> list[str]:
    file = run / LAUNCH / EXCLUDED
    return list(json.loads(file.read_text())) if file.is_file() else []


def begin(run: Path, nodes: list[str], job: str = "", restart: int = 0) -> list[str]:
    """Begin an attempt -> its folder, the address where ranks meet and the port."""
    settings = settings_of(run)
    folder = attempts.begin(run, job, restart, nodes, Limits(**settings["limits"]), settings["submission"])
    # jobs on the same node, and restarts whose sockets still linger, must not meet
    port = FIRST_PORT + (int(job or os.getpid()) * 97 + int(folder.name)) % PORTS
    return [str(folder), nodes[0], str(port)]


def check_name(node: str) -> None:
    """Raise a UserError if a name does not resolve; a fallback to this host would make a world of one of every rank."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        raise UserError(f"the name of the first node, {node}, does not resolve on {socket.gethostname()}") from None


def judge(folder: Path) -> list[str]:
    """After the nodes were measured -> ``go``, or ``bad``: broken or slow nodes are left out from now on.

    If most nodes look bad it is not them; then none is left out and the attempt has failed.

    Args:
        folder: of the attempt.
    """
    run, attempt = attempts.run_of(folder), attempts.read_attempt(folder)
    bad = bad_nodes(folder / "nodes", attempt.nodes, settings_of(run)["preflight"])
    if not bad or (folder / "stop").is_file():
        return ["go"]
    reason = "; ".join(f"{node}: {why}" for node, why in bad.items())
    outcome, words = attempts.outcome_of(folder, 0)
    refused = outcome == attempts.REFUSED
    if 2 * len(bad) >= len(attempt.nodes) and (len(bad) > 1 or refused):
        attempts.end(run, attempt, outcome, words if refused else f"most nodes look bad, so none is left out: {reason}")
        return ["bad"]
    write_atomically(run / LAUNCH / EXCLUDED, to_json(sorted({*_found_bad(run), *bad})) + "\n")
    attempts.end(run, attempt, attempts.BAD_NODES, reason)
    return ["bad"]


def decide(folder: Path, code: int) -> list[str]:
    """After the ranks have ended -> action, reason, nodes to leave out, seconds to wait; the attempt's end is recorded.

    What failed without a new checkpoint waits before it is tried in the same allocation, twice as long each time: the batch system
    may just be finding out that a node is dead.

    Args:
        folder: of the attempt.
        code: of the command that ran the ranks.
    """
    run, attempt = attempts.run_of(folder), attempts.read_attempt(folder)
    settings = settings_of(run)
    if not attempt.outcome:
        attempts.end(run, attempt, *attempts.outcome_of(folder, code))
    known = [found for found in attempts.read_attempts(run) if found.number <= attempt.number]
    verdict = attempts.decide(known, settings["max_restarts"], attempts.is_cancelled(run), left_out(run))
    print(f"bitlm: attempt {attempt.number}: {known[-1].outcome}: {known[-1].reason}; {verdict.action}", file=sys.stderr)
    if verdict.action == "give up":
        print(f"bitlm: {verdict.reason}", file=sys.stderr)
    wait = min(LONGEST_PAUSE, settings["pause"] * 2 ** (verdict.idle - 1)) if verdict.idle else 0
    return [verdict.action, verdict.reason, ",".join(verdict.exclude), f"{wait:.0f}"]


def main() -> None:
    """The command line."""
    command, place, *rest = sys.argv[1:]
    try:
        if command == "begin":
            check_name(rest[0])
            restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            lines = begin(Path(place), rest, os.environ.get("SLURM_JOB_ID", ""), restart)
        elif command == "judge":
            lines = judge(Path(place))
        elif command == "left_out":
            lines = [",".join(left_out(Path(place)))]
        else:
            assert command == "decide"
            lines = decide(Path(place), int(rest[0]))
    except (UserError, OSError) as error:
        print(f"bitlm: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
