import errno
import socket
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from fsspec.registry import _registry

from bitlm_dist.data_prep.input_files import find_files
from bitlm_dist.data_prep.remote_errors import remote_problem
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import iter_chunks
from bitlm_dist.errors import UserError


class Handler(BaseHTTPRequestHandler):
    """Answers /CODE.txt with that status; /late.txt exists until it is read."""

    def do_HEAD(self) -> None:
        if not self.path.startswith("/late"):
            self.send_error(int(self.path[1:4]))
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_error(503 if self.path.startswith("/late") else int(self.path[1:4]))

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        thread = Thread(target=site.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{site.server_port}"
        site.shutdown()
        thread.join()


def refusal(url):
    with pytest.raises(UserError) as refused:
        find_files([url], Counter())
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)
    return str(refused.value).removeprefix(url.partition("?")[0])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("404.txt?key=secret", " does not exist"),
        ("403.txt", " cannot be read: permission denied (HTTP 403): check the credentials"),
        ("401.txt?key=secret", " cannot be read: permission denied (HTTP 401): check the cre"),
        ("503.txt", " cannot be read: the server answers with HTTP 503: try again later"),
    ],
)
def test_an_answer_of_a_server_is_told_from_a_file_that_does_not_exist(server, path, words):
    assert refusal(f"{server}/{path}").startswith(words)


@pytest.mark.parametrize("path", ["x.txt?key=secret", "folder"])
def test_a_refused_connection_is_named(path):
    words = " cannot be reached: connection refused: check the address, and that its server runs"
    assert refusal(f"http://127.0.0.1:9/{path}") == words


def test_a_file_that_goes_while_it_is_read_is_named(server):
    files = find_files([f"{server}/late.txt?key=secret"], Counter())
    with pytest.raises(UserError, match=r"late.txt cannot be read: the server .* HTTP 503") as gone:
        list(iter_chunks(files, Settings()))
    assert "secret" not in str(gone.value)


@pytest.mark.parametrize(
    ("protocol", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, protocol, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, protocol, raising=False)
    words = f" needs the package {package}: pip install 'bitlm-dist[{extra}]'"
    assert refusal(f"{protocol}://bucket/x.txt") == words


def wrapped(cause):
    """As libraries do: an exception of their own, raised from that of the system."""
    error = FileNotFoundError("s3://b/x.txt?key=secret")
    error.__cause__ = RuntimeError("at s3://b/x.txt?key=secret: no luck")
    error.__cause__.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (wrapped(socket.gaierror(-2, "Name not known")), "cannot be reached: Name not known: chec"),
        (wrapped(TimeoutError(errno.ETIMEDOUT, "x")), "cannot be reached: connection timed out: "),
        (wrapped(PermissionError(errno.EACCES, "x")), "cannot be read: permission denied: check"),
        (wrapped(OSError(errno.EIO, "x")), "cannot be read: input/output error"),
        (wrapped(None), "cannot be read: RuntimeError: at s3://b/x.txt: no luck"),
        (FileNotFoundError("s3://b/x.txt?key=secret"), "does not exist"),
        (FileNotFoundError(errno.ENOENT, "x"), "does not exist"),
    ],
)
def test_the_deepest_cause_is_the_reason(error, words):
    assert remote_problem("s3://b/x.txt?key=secret", error).startswith(f"s3://b/x.txt {words}")
