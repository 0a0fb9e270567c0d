"""Rank processes that are small scripts: who is named, who is ended, what is shown."""

import os
import signal
import sys
import time

import pytest

from bitlm_dist.launch import attempts, local_ranks
from bitlm_dist.launch.attempts import Limits, Outcome
from bitlm_dist.launch.local_ranks import RankProcesses
from bitlm_dist.launch.outcomes import outcome_of

pytestmark = pytest.mark.integration

# The script of a rank runs with its rank, its attempt folder, and its log as standard output.
SCRIPT = """
import os, signal, sys, time
from bitlm_dist.launch.attempts import report_failure, report_outcome
rank = int(os.environ["RANK"])
log = open(os.environ["BITLM_ATTEMPT"] + f"/logs/rank-{rank}.log", "a", buffering=1)
def fail(message, lost_peer=False, refused=False):
    report_failure(os.environ, rank, message, lost_peer, refused)
def wait_for_failure():
    while not os.listdir(os.environ["BITLM_ATTEMPT"] + "/failures"):
        time.sleep(0.01)
"""


@pytest.fixture
def run_ranks(tmp_path, monkeypatch):
    """Function (scripts, requests) that runs ranks; it returns outcome, reason and shown lines."""
    monkeypatch.setattr(local_ranks, "POLL", 0.02)

    def run(*scripts, requests=()):
        folder = attempts.create_attempt(tmp_path, "", 0, ["here"], Limits(0.1, 1.0, 9.0, 9.0))
        program = SCRIPT + "".join(
            f"if rank == {rank}:\n" + "".join(f"    {line}\n" for line in script.splitlines())
            for rank, script in enumerate(scripts)
        )
        monkeypatch.setattr(local_ranks, "rank_command", lambda _: [sys.executable, "-c", program])
        shown = []
        code = RankProcesses(folder, len(scripts), {}, shown.append).wait(requests)
        return *outcome_of(folder, code), shown

    return run


@pytest.mark.parametrize(
    ("death", "words"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "was killed by signal 9 (SIGKILL); out of memory? see dmesg",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by signal 11 (SIGSEGV)"),
        (
            "os.kill(os.getpid(), signal.SIGBUS)",
            "was killed by signal 7 (SIGBUS); shared memory full? see df /dev/shm",
        ),
        ("os._exit(5)", "ended with exit code 5 and reported nothing"),
    ],
)
def test_a_rank_without_words_is_named_at_once_and_the_others_are_ended(run_ranks, death, words):
    began = time.monotonic()
    lost_peer = (
        "log.write('step 1\\n')\nwait_for_failure()\n"
        "fail('gloo: Connection closed by peer', lost_peer=True)\n"
        "log.write('Traceback (most recent call last):\\n  x\\n')\ntime.sleep(60)"
    )
    outcome, reason, shown = run_ranks(lost_peer, f"time.sleep(0.2)\n{death}")
    assert outcome == Outcome.FAILED
    assert reason == f"rank 1 on {os.uname().nodename} {words}"
    assert shown == ["step 1"]
    assert time.monotonic() - began < local_ranks.GRACE


def test_an_abort_after_the_failure_of_another_rank_is_no_cause(run_ranks):
    _, reason, _ = run_ranks(
        "fail('ValueError: x')\ntime.sleep(0.3)\nos._exit(1)",
        "wait_for_failure()\ntime.sleep(0.1)\nos.abort()",
    )
    assert reason == f"rank 0 on {os.uname().nodename}: ValueError: x"


def test_a_rank_that_lost_a_peer_is_waited_for_until_the_cause_is_known(run_ranks, monkeypatch):
    monkeypatch.setattr(local_ranks, "GRACE", 5.0)
    _, reason, _ = run_ranks(
        "fail('Connection reset', lost_peer=True)\nos._exit(1)",
        "wait_for_failure()\ntime.sleep(0.3)\nfail('ValueError: late')\nos._exit(1)",
    )
    assert reason.endswith("ValueError: late")
    monkeypatch.setattr(local_ranks, "GRACE", 0.1)
    _, reason, _ = run_ranks(
        "fail('Connection reset', lost_peer=True)\nos._exit(1)", "time.sleep(60)"
    )
    assert reason.endswith("Connection reset")


def test_what_the_launcher_will_say_is_not_said_twice(run_ranks):
    refused = (
        "fail('no such shard', refused=True)\nlog.write('bitlm: no such shard\\n')\nos._exit(2)"
    )
    outcome, reason, shown = run_ranks(refused)
    assert (outcome, reason, shown) == (Outcome.REFUSED, "no such shard", [])


def test_the_first_request_saves_and_the_second_ends_at_once(run_ranks):
    stopping = (
        "while not os.path.exists(os.environ['BITLM_ATTEMPT'] + '/stop'):\n    time.sleep(0.01)\n"
        "report_outcome(os.environ, 'stopped', 7, 'stop file')"
    )
    outcome, reason, shown = run_ranks(stopping, requests=[signal.SIGINT])
    assert (outcome, reason) == (Outcome.STOPPED, "SIGINT, saved at step 7")
    assert shown == ["bitlm: SIGINT: saving; once more ends it at once"]
    twice = [signal.SIGINT, signal.SIGINT]
    outcome, reason, _ = run_ranks("time.sleep(60)", requests=twice)
    assert (outcome, reason) == (Outcome.STOPPED, "SIGINT")


def test_the_stacks_of_all_but_the_hung_rank_are_waited_for(run_ranks):
    began = time.monotonic()
    hang = "open(os.environ['BITLM_ATTEMPT'] + '/hung.json', 'w').write("
    hang += '\'{"rank": 1, "host": "n1", "what": "is stuck"}\')\n'
    outcome, reason, _ = run_ranks(
        f"{hang}log.write('stack\\n')\nos._exit(1)",
        "time.sleep(60)",
        "time.sleep(0.5)\nlog.write('stack\\n')\nos._exit(1)",
    )
    assert (outcome, reason) == (Outcome.HUNG, "rank 1 on n1 is stuck")
    assert 0.5 < time.monotonic() - began < local_ranks.GRACE
