"""What a batch script asks: `python -m bitlm_dist.launch.agent begin|judge|decide`; answers are lines for `mapfile`.

It needs the standard library alone. Exit code 2 and a line on standard error: the job cannot go on, and another try would not
help.
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
from bitlm_dist.files import write_atomically

SETTINGS, EXCLUDED = "settings.json", "excluded.json"
FIRST_PORT, PORTS = 15_000, 15_000


def settings_of(run: Path) -> dict[str, Any]:
    """What the submitting command left for the job."""
    found: dict[str, Any] = json.loads((run / LAUNCH / SETTINGS).read_text())
    return found


def excluded(run: Path) -> list[str]:
    """Nodes that were found bad."""
    file = run / LAUNCH / EXCLUDED
    return list(json.loads(file.read_text())) if file.is_file() else []


def begin(run: Path, nodes: list[str]) -> list[str]:
    """Begin an attempt -> its folder, the address where ranks meet and the port.

    Raises:
        UserError: the first node's name does not resolve; a fallback to this host would make a world of one of every rank.
    """
    try:
        socket.getaddrinfo(nodes[0], None)
    except OSError:
        raise UserError(f"the name of the first node, {nodes[0]}, does not resolve on {socket.gethostname()}") from None
    job, restart = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    folder = attempts.begin(run, job, restart, nodes, Limits(**settings_of(run)["limits"]))
    # jobs on the same node, and restarts whose sockets still linger, must not meet
    port = FIRST_PORT + (int(job or os.getpid()) * 97 + int(folder.name)) % PORTS
    return [str(folder), nodes[0], str(port)]


def judge(run: Path) -> list[str]:
    """After the nodes were measured -> ``go``, or ``bad`` where some are broken or slow, which from now on are excluded."""
    attempt = attempts.read_attempts(run)[-1]
    folder = attempts.folder_of(run, attempt.number)
    bad = bad_nodes(folder / "nodes", attempt.nodes, settings_of(run)["preflight"])
    if not bad or (folder / "stop").is_file():
        return ["go"]
    outcome, words = attempts.outcome_of(folder, 0)
    if outcome == attempts.REFUSED and 2 * len(bad) >= len(attempt.nodes):  # not one node's fault
        attempts.end(run, attempt, outcome, words)
        return ["bad"]
    reason = "; ".join(f"{node}: {why}" for node, why in bad.items())
    known = {*excluded(run), *bad}
    write_atomically(run / LAUNCH / EXCLUDED, json.dumps(sorted(known)) + "\n")
    attempts.end(run, attempt, attempts.BAD_NODES, reason)
    print(f"bitlm: {reason}", file=sys.stderr)
    return ["bad"]


def decide(run: Path, code: int) -> list[str]:
    """After the ranks have ended -> action, reason, nodes to exclude, seconds to wait; the attempt's end is recorded.

    What failed without a new checkpoint waits before it is tried in the same allocation, twice as long each time: the batch system
    may just be finding out that a node is dead.
    """
    attempt, settings = attempts.read_attempts(run)[-1], settings_of(run)
    if not attempt.outcome:
        attempts.end(run, attempt, *attempts.outcome_of(attempts.folder_of(run, attempt.number), code))
    every = attempts.read_attempts(run)
    verdict = attempts.decide(every, settings["max_restarts"], attempts.is_cancelled(run), excluded(run))
    print(f"bitlm: attempt {attempt.number}: {every[-1].outcome}: {every[-1].reason}; {verdict.action}", file=sys.stderr)
    if verdict.action == "give up":
        print(f"bitlm: {verdict.reason}", file=sys.stderr)
    wait = settings["pause"] * 2 ** (verdict.idle - 1) if verdict.idle else 0
    return [verdict.action, verdict.reason, ",".join(verdict.exclude), f"{wait:.0f}"]


def main() -> None:
    """The command line."""
    command, run, *rest = sys.argv[1:]
    try:
        if command == "begin":
            lines = begin(Path(run), rest)
        elif command == "judge":
            lines = judge(Path(run))
        else:
            assert command == "decide"
            lines = decide(Path(run), int(rest[0]))
    except UserError as error:
        print(f"bitlm: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
