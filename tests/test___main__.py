"""The entry point: interrupts, outputs that cannot be written, encodings."""

import os
import subprocess
import sys

import pytest


def bitlm(*words, shell="", **environment):
    """Run the command in a process; ``shell`` follows it, e.g. a redirection."""
    line = f"{sys.executable} -m bitlm_dist {' '.join(words)} {shell}"
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.integration
@pytest.mark.parametrize("delay", [0.03, 0.1, 0.5])
def test_an_interrupt_is_one_line_at_every_moment(delay):
    program = f"""
import os, signal, sys, threading
from bitlm_dist.__main__ import main
sys.argv = ["bitlm", "doctor"]
threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGINT)).start()
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "bitlm: interrupted"
    assert "Traceback" not in result.stderr


@pytest.mark.integration
def test_output_that_cannot_be_written_is_one_line():
    result = bitlm("config", shell="> /dev/full")
    assert result.returncode == 2
    assert result.stderr.startswith(b"bitlm: no space left on device: make room")
    assert result.stderr.count(b"\n") == 1

    for words in (("config",), ("--version",)):  # more than a buffer holds, and less
        result = bitlm(*words, shell="| true", PYTHONUNBUFFERED="")
        assert result.stderr == b""

    # the exit code does not depend on whether the error could be told
    assert bitlm("eval", "/nonexistent", shell="2> /dev/full").returncode == 2
    result = bitlm("eval", "/nonexistent", shell=">&-")
    assert result.returncode == 2
    assert result.stderr.count(b"\n") == 1


@pytest.mark.integration
def test_an_encoding_without_the_signs_gets_others():
    result = bitlm("config", "data", PYTHONIOENCODING="ascii", NO_COLOR="1")
    assert result.returncode == 0
    assert result.stdout.isascii()
    assert b"data.sequence_length" in result.stdout
    assert b"\x1b" not in result.stdout
