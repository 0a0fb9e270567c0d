"""The exceptions that address users, exit codes, and error output from a job of many ranks."""

import errno
import os
import socket
import sys
import time
import traceback
import warnings
from contextlib import suppress

# Seconds that other ranks wait before they print an error that rank 0 most likely prints, too.
OTHER_RANKS_DELAY = 5.0
# Seconds that a rank waits if it only lost its peers; the launcher ends it in the meantime.
LOST_PEER_DELAY = 20.0
LOST_PEER_SIGNS = ("closed by peer", "connection reset", "broken pipe", "timed out", "gloo", "nccl")

# Exit codes; docs/reliability.md has the table.
USER_ERROR_EXIT_CODE = 2
DIVERGED_EXIT_CODE = 3
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: saved on request; the same command goes on
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it
TERMINATED_EXIT_CODE = 143  # 128 + SIGTERM

# What to do about an error of the operating system; the reason itself is the system's own text.
_REMEDIES = {
    errno.EACCES: "choose another path, or ask for the permission",
    errno.EPERM: "choose another path, or ask for the permission",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.ENOSPC: "make room on that disk, or choose a folder on another one",
    errno.EDQUOT: "make room: your quota is used up",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EEXIST: "choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the link, which leads to itself",
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.EIO: "check the disk",
    errno.ESTALE: "the network file system lost it: try again, or mount it anew",
}
_NUM_SHOWN_CHARS = 40  # at both ends of a path that is too long
# A second try meets the same error until the user does something.
_PERMANENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line that names the key or file and the remedy. The command exits with 2.
    """


class DivergedError(RuntimeError):
    """Training produced non-finite values.

    The message is one line: what happened, and where to resume. The command exits with 3.
    """


def os_error_message(error: OSError) -> str:
    """Describe an error of the operating system in one line: path, reason and remedy.

    Without a path or number, as libraries raise it, the line is the error's own text.
    """
    path = error.filename2 or error.filename
    name = os.fsdecode(path) if isinstance(path, bytes | str | os.PathLike) else str(path)
    if error.errno == errno.ENAMETOOLONG and len(name) > 2 * _NUM_SHOWN_CHARS:
        name = f"{name[:_NUM_SHOWN_CHARS]}…{name[-_NUM_SHOWN_CHARS:]}"
    where = f"{name}: " if path is not None else ""
    if error.errno is None or not error.strerror:
        return where + (" ".join(str(error).split()) or type(error).__name__)

    remedy = _REMEDIES.get(error.errno, "")
    reason = f"{error.strerror[0].lower()}{error.strerror[1:]}"
    return f"{where}{reason}" + (f": {remedy}" if remedy else "")


def is_permanent_os_error(error: OSError) -> bool:
    """True if a second try would meet the same error, so that only the user can help."""
    return error.errno in _PERMANENT


def filter_third_party_warnings() -> None:
    """Silence the GPU hints of Megatron-core and streaming, repeated at every import.

    `bitlm doctor` reports the same once.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|streaming|torch\.distributed|pynvml)\b")


def log_to_stderr(text: str) -> None:
    """Print a line to standard error, for problems that do not end the run."""
    _print_error(f"bitlm: {text}")


def log_traceback(error: BaseException) -> None:
    """Print the traceback of an error to standard error."""
    _print_error("".join(traceback.format_exception(error)).rstrip("\n"))


def _print_error(text: str) -> None:
    """Print to standard error; on a full disk, the text is left for the next attempt to flush.

    The log may be on the disk whose lack of space is being reported, and a report that fails must
    neither end a run nor change how it ends.
    """
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def log_error_once_per_job(message: str, rank: int) -> None:
    """Print an error that every rank of a job is likely to raise.

    Rank 0 prints it at once. Other ranks print only if they are still alive a while later.
    """
    if rank > 0:
        time.sleep(OTHER_RANKS_DELAY)
        message = f"rank {rank} on {socket.gethostname()}: {message}"
    _print_error(message)


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

    log_traceback(error)
    log_to_stderr(
        f"rank {rank} on {socket.gethostname()} failed: {type(error).__name__}: {message}"
    )
