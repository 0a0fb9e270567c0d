import io
import re
import time

import pytest
from rich.console import Console

from bitlm_dist.cli import prep_progress, progress
from bitlm_dist.cli.prep_progress import preparation_progress
from bitlm_dist.cli.progress import loss_chart
from bitlm_dist.data_prep.progress import Progress

STEPS = [
    Progress("training bpe:300"),
    *(Progress("tokenizing", i, 100, 10**6 * i, i) for i in (0, 10, 50, 100)),
    Progress("finishing"),
]


def shown(terminal, steps=STEPS, width=120, pause=lambda: None):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, force_interactive=terminal, width=width)
    with preparation_progress(console) as observe:
        for step in steps:
            observe(step)
            pause()
    return stream.getvalue()


def last_frame(output):
    """The rows that a terminal shows in the end, without colours."""
    frame = re.split(r"\x1b\[1A\x1b\[2K(?!\x1b)", output)[-1]
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frame).replace("\r", "").strip("\n").splitlines()


@pytest.mark.parametrize("width", [80, 100])
def test_a_terminal_gets_a_bar_for_each_phase(monkeypatch, width):
    monkeypatch.setattr(prep_progress, "MIN_RATE_SECONDS", 0.0)
    rows = last_frame(shown(True, width=width))
    assert [row.partition("━")[0].strip() for row in rows] == [
        "training bpe:300",
        "tokenizing",
        "finishing",
    ]
    assert re.search(r"100 %, 100 documents, [\d.]+ MB/s +0:00:00$", rows[1].rstrip())
    assert all(len(row) <= width for row in rows)
    assert all("left" not in row for row in rows), "all phases have ended"


def test_a_rate_and_the_time_left_wait_for_the_first_second(monkeypatch):
    assert "MB/s" not in shown(True)
    assert "left" not in shown(True)
    # a corpus of two units: after half of it in 2 s, as much is left
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(prep_progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    log = prep_progress._PhaseLog(Console(file=stream, width=200))
    log.update(STEPS[1])
    log._print_status(STEPS[3])
    line = stream.getvalue().splitlines()[-1]
    assert line.endswith(" tokenizing: 50 %, 50 documents, 25.0 MB/s, 0:00:02, left 0:00:02")


def test_elsewhere_a_line_with_the_time_for_each_phase_and_now_and_then(monkeypatch):
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d "
    lines = shown(False).splitlines()
    assert [re.sub(stamp, "", line) for line in lines] == [
        "training bpe:300",
        "tokenizing",
        "finishing",
    ]
    assert all(re.match(stamp, line) for line in lines)

    # also while a phase lasts without an update
    monkeypatch.setattr(progress, "PLAIN_LOG_SECONDS", 0.01)
    lines = shown(False, STEPS[:1], pause=lambda: time.sleep(0.1)).splitlines()
    assert len(lines) > 2
    assert lines[1].endswith(" training bpe:300: 0:00:00")


def test_a_chart_shows_where_the_loss_was():
    rows = loss_chart([4.0, 3.0, 2.0, 1.0], width=4, height=4).splitlines()
    assert [row.partition("┤")[2] for row in rows[:4]] == ["█   ", "█▆  ", "██▃ ", "███▁"]
    assert rows[0].startswith("    4.000")
    assert rows[3].startswith("    1.000")
    assert rows[-1].split() == ["1", "4"]


def test_a_chart_leaves_out_what_is_not_finite():
    assert (
        loss_chart([float("nan"), 2.0, float("inf"), 1.0], 4, 2).splitlines()[0]
        == "    2.000 ┤███ "
    )
    assert loss_chart([float("nan"), 1.0]) == ""
