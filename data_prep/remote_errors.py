"""Why a URL cannot be read, in one line.

fsspec and the libraries below it wrap the cause in exceptions of their own; a refused connection
becomes a FileNotFoundError.
"""

import os
import socket
from collections.abc import Iterator

# Protocols whose package is an optional dependency: package and extra.
EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
EXTRAS["gcs"] = EXTRAS["gs"]


def remote_problem(url: str, error: Exception) -> str:
    """Describe why ``url`` cannot be read: the URL, what was met and the remedy.

    Args:
        url: with its query, which may hold a key and is left out.
        error: the exception of fsspec.
    """
    shown = url.partition("?")[0]
    protocol = url.partition("://")[0]
    links = list(_causes(error))
    if any(isinstance(link, ImportError) for link in links):
        if protocol not in EXTRAS:
            return f"{shown}: {' '.join(str(error).split())}"
        package, extra = EXTRAS[protocol]
        return f"{shown} needs the package {package}: pip install 'bitlm-dist[{extra}]'"
    if "Protocol not known" in str(error):
        return f"{shown}: there is no protocol {protocol}://: use https://, s3://, gs:// or a path"

    status = next((link.status for link in links if hasattr(link, "status")), None)
    if isinstance(status, int):
        return f"{shown} {_status_problem(status)}"

    system_errors = [link for link in links if isinstance(link, OSError) and link.errno is not None]
    if system_errors:
        return f"{shown} {_system_problem(system_errors[-1])}"
    if isinstance(links[-1], FileNotFoundError):
        return f"{shown} does not exist"

    # The message may hold the URL with its key.
    text = " ".join(str(links[-1]).replace(url, shown).split())
    return f"{shown} cannot be read: {type(links[-1]).__name__}: {text}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, the one that caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status_problem(status: int) -> str:
    """Describe an HTTP status."""
    if status in (404, 410):
        return "does not exist"
    if status in (401, 403):
        return f"cannot be read: permission denied (HTTP {status}): check the credentials"
    return f"cannot be read: the server answers with HTTP {status}: try again later"


def _system_problem(error: OSError) -> str:
    """Describe an error of the operating system."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied: check the credentials"
    if isinstance(error, socket.gaierror):
        return f"cannot be reached: {error.strerror}: check the name of the host and the network"

    assert error.errno is not None
    reason = os.strerror(error.errno).lower()
    if isinstance(error, ConnectionError | TimeoutError):
        return f"cannot be reached: {reason}: check the address, and that its server runs"
    return f"cannot be read: {reason}"
