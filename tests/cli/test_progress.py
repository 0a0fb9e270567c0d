import io

from rich.console import Console

from bitlm_dist.cli import progress
from bitlm_dist.cli.prep_progress import preparation_progress
from bitlm_dist.cli.progress import loss_chart
from bitlm_dist.data_prep.prepare import Progress

STEPS = [
    Progress("training bpe:300", 50, 100, 2_000_000, 5),
    *(Progress("preparing", i, 100, 10**6 * i, i) for i in (10, 50, 100)),
]


def shown(terminal, steps=STEPS):
    stream = io.StringIO()
    with preparation_progress(Console(file=stream, force_terminal=terminal, width=120)) as observe:
        for step in steps:
            observe(step)
    return stream.getvalue()


def test_a_terminal_gets_a_bar_for_each_phase():
    output = shown(True)
    for part in ("training bpe:300", "preparing", "100%", "100 documents", "MB/s", "left"):
        assert part in output


def test_elsewhere_a_line_now_and_then(monkeypatch):
    assert shown(False) == ""
    monkeypatch.setattr(progress, "PLAIN_LOG_SECONDS", 0.0)
    lines = shown(False).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("preparing  50%  50 documents  50.0 MB of text  ")
    assert shown(False, [Progress("preparing", 5, 0, 5, 1)]).startswith("preparing  1 documents")


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
