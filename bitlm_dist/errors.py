"""The exceptions that address users, and error output from a job of many ranks."""

import socket
import sys
import time
import traceback
import warnings

# Seconds that other ranks wait before they print an error that rank 0 most likely prints, too.
OTHER_RANKS_DELAY = 5.0
# Seconds that a rank waits if it only lost its peers; the launcher ends it in the meantime.
LOST_PEER_DELAY = 20.0
DIVERGED_EXIT_CODE = 3
LOST_PEER_SIGNS = ("closed by peer", "connection reset", "broken pipe", "timed out", "gloo", "nccl")


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line that names the key or file and the remedy. The command exits with 2.
    """


class DivergedError(RuntimeError):
    """Training produced non-finite values.

    The message is one line: what happened, and where to resume. The command exits with 3.
    """


def filter_third_party_warnings() -> None:
    """Silence the GPU hints of Megatron-core and streaming, repeated at every import.

    `bitlm doctor` reports the same once.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|streaming|torch\.distributed|pynvml)\b")


def log_to_stderr(text: str) -> None:
    """Print a line to standard error, for problems that do not end the run."""
    print(f"bitlm: {text}", file=sys.stderr, flush=True)


def log_error_once_per_job(message: str, rank: int) -> None:
    """Print an error that every rank of a job is likely to raise.

    Rank 0 prints it at once. Other ranks print only if they are still alive a while later.
    """
    if rank > 0:
        time.sleep(OTHER_RANKS_DELAY)
        message = f"rank {rank} on {socket.gethostname()}: {message}"
    print(message, file=sys.stderr, flush=True)


def is_lost_peer_error(message: str) -> bool:
    """True if an error only says that another rank is gone."""
    return any(sign in message.lower() for sign in LOST_PEER_SIGNS)


def log_rank_failure(error: BaseException, rank: int) -> None:
    """Print the traceback of the error that ended this rank, and last a line with rank and host.

    A rank that only lost its peers waits first, so that the rank with the cause is heard.
    """
    message = " ".join(str(error).split())
    if is_lost_peer_error(message):
        time.sleep(LOST_PEER_DELAY)

    traceback.print_exception(error)
    print(
        f"bitlm: rank {rank} on {socket.gethostname()} failed: {type(error).__name__}: {message}",
        file=sys.stderr,
        flush=True,
    )
