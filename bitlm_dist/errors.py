"""The one exception that speaks to users, and how one of many processes speaks."""

import socket
import sys
import time
import traceback
import warnings

FIRST_SPEAKS = 5.0  # seconds that other ranks wait with what rank 0 most likely says too
FOLLOWER = 20.0  # seconds that a rank waits which only lost its peers: the launcher ends it meanwhile
DIVERGED = 3  # exit code
LOST_PEER = ("closed by peer", "connection reset", "broken pipe", "timed out", "gloo", "nccl")


class UserError(ValueError):
    """Something the user can mend: the message is one line that names the key or file and the remedy. The command exits with 2."""


class DivergedError(RuntimeError):
    """Training arrived at numbers that are not finite: one line with what happened and where to go on. The command exits with 3."""


def silence_announcements() -> None:
    """Keep Megatron-core and streaming from announcing at every import what they would do on a GPU; `bitlm doctor` says it once."""
    warnings.filterwarnings("ignore", module=r"(megatron|streaming|torch\.distributed|pynvml)\b")


def say(text: str) -> None:
    """Print a line that no run ends with."""
    print(f"bitlm: {text}", file=sys.stderr, flush=True)


def say_once(message: str, rank: int) -> None:
    """Print an error that every process of a job is likely to meet: rank 0 at once, another one only if it is still alive later."""
    if rank > 0:
        time.sleep(FIRST_SPEAKS)
        message = f"rank {rank} on {socket.gethostname()}: {message}"
    print(message, file=sys.stderr, flush=True)


def only_lost_peer(message: str) -> bool:
    """Whether an error only says that another rank is gone."""
    return any(sign in message.lower() for sign in LOST_PEER)


def say_failure(error: BaseException, rank: int) -> None:
    """Print what ended this rank of a job, last a line with rank and host; one that only lost its peers leaves them the word."""
    message = " ".join(str(error).split())
    if only_lost_peer(message):
        time.sleep(FOLLOWER)
    traceback.print_exception(error)
    print(f"bitlm: rank {rank} on {socket.gethostname()} failed: {type(error).__name__}: {message}", file=sys.stderr, flush=True)
