"""What training shows: on a terminal and elsewhere."""

import io
import os
import re
import time

import pytest
from rich.console import Console

from bitlm_dist.cli import progress, train_progress
from bitlm_dist.cli.train_progress import TimeLeft, training_progress

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d "
SAMPLES = [{"prompt": "In the\nbeginning", "text": " was [red] the " + "word " * 100}]
NUM_STEPS = 40


@pytest.fixture
def clock(monkeypatch):
    """The clock of the displays, which stands still until it is moved."""
    now = [1000.0]
    monkeypatch.setattr(train_progress.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def metrics(step, seconds, loss=2.5):
    return {
        "step": step,
        "seconds": seconds,
        "loss": loss,
        "grad_norm": 0.5,
        "tokens_per_second": 1234.0,
        "predicted_tokens_per_second": 1200.0,
    }


def shown(tiny, clock, terminal, width=100):
    """What a run shows that takes a second per step, evaluates every 10 steps, and ends at 40."""
    stream = io.StringIO()
    words = ("--training.steps", str(NUM_STEPS), "--evaluation.every_steps", "10")
    console = Console(file=stream, force_terminal=terminal, width=width, _environ={"TERM": "xterm"})
    with training_progress(console, tiny(*words), 0) as display:
        for step in range(1, NUM_STEPS + 1):
            clock(1.0)
            display(metrics(step, float(step)))
            if step % 10 == 0:
                with display.phase("evaluating"):
                    clock(5.0)
                report = {"bits_per_byte": 3 - step / 100, "exact": False, "bytes_note": None}
                display.show_evaluation(step, report, SAMPLES if step == 10 else [])
    return stream.getvalue()


def test_elsewhere_a_line_with_the_time_at_first_every_30_seconds_and_at_last(tiny, clock):
    lines = shown(tiny, clock, terminal=False).splitlines()
    assert all(re.match(STAMP, line) for line in lines)
    lines = [line.partition(" ")[2] for line in lines]
    assert lines[0] == (
        "step 1/40  loss 2.5000  grad norm 0.500  1,234 tokens/s, 1,200 of them predicted  left –"
    )
    assert lines[1] == "step 10: validation 2.900 bits per byte (bound)"
    assert lines[2].startswith("  In the beginning → was [red] the word word")
    assert lines[2].endswith("…")
    assert lines[3] == "step 20: validation 2.800 bits per byte (bound; −0.100)"

    # 30 s after the first line: 20 steps and two evaluations. 19 and two are left.
    assert lines[4].startswith("step 21/40 ")
    assert lines[4].endswith(" left 0:00:29")
    assert [line.partition("  ")[0] for line in lines[5:]] == [
        "step 30: validation 2.700 bits per byte (bound; −0.100)",
        "step 40/40",
        "step 40: validation 2.600 bits per byte (bound; −0.100)",
    ]
    assert "left" not in lines[6]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_a_terminal_gets_a_bar_that_names_what_goes_on_and_scores_above_it(tiny, clock, width):
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(tiny, clock, True, width))
    rows = re.split(r"[\r\n]+", output)
    assert max(map(len, rows)) <= width
    first = next(row for row in rows if row.startswith("step  0/40 "))
    assert "loss –" in first
    assert ("left –" in first, "– tokens/s" in first, "– predicted" in first) == (
        width >= 50,
        width >= 80,
        width >= 100,
    )
    bars = [row for row in rows if "loss" in row]
    assert not any("…" in row for row in bars)
    assert any(row.startswith("evaluating 10/40 ") for row in bars)
    assert any(row.startswith("step 20: validation 2.800 bits per byte") for row in rows)
    assert rows[-2].startswith("step 40/40 ")
    assert "nan" not in output


def test_elsewhere_a_long_evaluation_is_told_of(tiny, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_LOG_SECONDS", 0.02)
    stream = io.StringIO()
    with training_progress(Console(file=stream, width=100), tiny(), 0) as display:
        with display.phase("evaluating"):
            end = time.monotonic() + 20
            while stream.getvalue().count("\n") < 2 and time.monotonic() < end:
                time.sleep(0.01)
        told = stream.getvalue()
        time.sleep(0.1)
    assert re.fullmatch(rf"({STAMP}evaluating for 0:00:00\n)+", told)
    assert stream.getvalue().count("\n") <= told.count("\n") + 1


def test_a_score_that_is_missing_or_exact_says_so():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=100)
    from bitlm_dist.config_loading import load_config

    with training_progress(console, load_config(None).config, 0) as display:
        display.show_evaluation(1, {"bits_per_byte": None, "nats_per_token": 4.5}, [])
        display.show_evaluation(
            2,
            {"bits_per_byte": 2.0, "exact": True, "bytes_note": "x"},
            [{"prompt": "", "text": ""}],
        )
    lines = [line.partition(" ")[2] for line in stream.getvalue().splitlines()]
    assert lines[0] == "step 1: validation 4.500 nats per token (bound)"
    assert lines[1] == "step 2: validation 2.000 approximate bits per byte (exact)"
    assert lines[2].strip() == "(no prompt) →"


def test_a_full_disk_ends_no_run_and_a_closed_pipe_does(tiny):
    with open("/dev/full", "w") as stream:
        with training_progress(Console(file=stream), tiny(), 0) as display:
            display(metrics(1, 1.0))
            display.show_evaluation(1, {"bits_per_byte": 2.0}, [])
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        with (
            training_progress(Console(file=stream), tiny(), 0) as display,
            pytest.raises(SystemExit),
        ):
            display(metrics(1, 1.0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


@pytest.mark.parametrize(
    ("num_steps", "every", "step", "num_left"),
    [(100, 10, 0, 10), (100, 10, 95, 1), (100, 10, 100, 0), (105, 10, 100, 1), (105, 10, 105, 0)],
)
def test_time_left_counts_the_evaluations_to_come(clock, num_steps, every, step, num_left):
    left = TimeLeft(num_steps, {"evaluating": every, "saving": 0})
    left.record_step(step, None)
    assert left.seconds is None

    for _ in range(3):
        left.record_step(step, 2.0)
    left.record_phase("evaluating", 7.0)
    left.record_phase("saving", 100.0)  # none of them is left
    assert left.seconds == 2.0 * (num_steps - step) + 7.0 * num_left

    clock(1.0)
    assert left.seconds == max(0.0, 2.0 * (num_steps - step) + 7.0 * num_left - 1.0)


def test_recent_steps_count():
    left = TimeLeft(1000, {})
    for step in range(1, 101):
        left.record_step(step, 10.0 if step <= 50 else 1.0)
    assert left.seconds == pytest.approx(900.0, abs=1.0)


def test_seconds_between_lines_are_those_of_all_commands():
    assert progress.PLAIN_LOG_SECONDS == 30
