import errno
import os

import pytest

from bitlm_dist.errors import (
    is_permanent_os_error,
    log_error_once_per_job,
    log_rank_failure,
    log_to_stderr,
    os_error_message,
)


def error_of(action):
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        action()
    return caught.value


def test_the_reason_is_true_and_the_remedy_fits(tmp_path):
    file = tmp_path / "file"
    file.touch()
    cases = {
        f"{tmp_path}/none: no such file or directory: check": (tmp_path / "none").read_text,
        f"{tmp_path}: is a directory: name a file": tmp_path.read_text,
        f"{file}/x: not a directory: a part of the path is a file": (file / "x").read_text,
        "…xxxx": (tmp_path / ("x" * 300)).read_text,
    }
    for words, action in cases.items():
        message = os_error_message(error_of(action))
        assert words in message
        assert "\n" not in message
        assert len(message) < 250

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")
    assert "/data/x: no space left on device: make room" in os_error_message(full)
    denied = OSError(errno.EACCES, os.strerror(errno.EACCES), "/data/x")
    assert "permission denied" in os_error_message(denied)
    assert "room" not in os_error_message(denied)


def test_errors_without_a_path_keep_their_words():
    assert os_error_message(OSError("two\nlines")) == "two lines"
    assert os_error_message(OSError()) == "OSError"
    assert os_error_message(OSError(errno.ENOSPC, "No space left on device")).startswith("no space")


def test_what_a_restart_cannot_mend():
    assert is_permanent_os_error(OSError(errno.EACCES, ""))
    assert not is_permanent_os_error(OSError(errno.ENOSPC, ""))
    assert not is_permanent_os_error(OSError(errno.ESTALE, "")), "a file server may come back"


def test_a_report_that_cannot_be_written_ends_nothing(monkeypatch):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        log_to_stderr("x")
        log_error_once_per_job("x", 0)
        log_rank_failure(ValueError("x"), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
