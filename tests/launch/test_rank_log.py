from bitlm_dist.launch.rank_log import (
    HANG_LINE,
    LogFollower,
    TracebackFilter,
    last_lines,
    main_stack_in,
)

SHOWN = [
    "2026-01-31T12:00:00 step 1/9",
    "bitlm: the evaluation of step 5 failed on rank 0: AssertionError",
    "2026-01-31T12:00:30 step 9/9",
]
LOG = [
    SHOWN[0],
    "Traceback (most recent call last):",
    '  File "x.py", line 1, in <module>',
    "AssertionError",
    *SHOWN[1:],
    "Traceback (most recent call last):",
    '  File "y.py", line 2, in <module>',
    "RuntimeError: Connection closed by peer",
    "frame #0: c10d::Backend",
    "bitlm: rank 0 on n0 failed: RuntimeError: Connection closed by peer",
]


def test_tracebacks_are_left_out_up_to_the_next_line_of_bitlm():
    passes = TracebackFilter().passes
    assert [line for line in LOG if passes(line)] == SHOWN
    hung = TracebackFilter().passes
    assert [hung(line) for line in (SHOWN[0], f"{HANG_LINE} (12:00)", "Thread 1")] == [
        True,
        False,
        False,
    ]


def test_a_log_is_followed_line_by_line(tmp_path):
    file = tmp_path / "rank-0.log"
    follower = LogFollower(file)
    assert follower.new_lines() == []
    file.write_bytes(b"one\ntw")
    assert follower.new_lines() == ["one"]
    with file.open("ab") as stream:
        stream.write(b"o \xff\nthree\n")
    assert follower.new_lines() == ["two \N{REPLACEMENT CHARACTER}", "three"]
    assert follower.new_lines() == []


def test_the_end_of_a_log_with_the_traceback_that_ended_it(tmp_path):
    file = tmp_path / "rank-0.log"
    noise = "resource_tracker.py:254: UserWarning: resource_tracker: leaked"
    file.write_text("\n".join([*LOG, noise]))
    assert last_lines(file, 2, 0) == LOG[-2:]
    assert last_lines(file, 2, 6) == LOG[-5:], "the last traceback as a whole"


def test_the_main_thread_of_a_rank_that_ended_because_of_another(tmp_path):
    file = tmp_path / "rank-0.log"
    file.write_text("step 1\n")
    assert main_stack_in(file) == []
    file.write_text(f"step 1\n{HANG_LINE} (12:00)\nThread 2:\n  File a\n\nThread 1:\n  File b\n")
    assert main_stack_in(file) == ["Thread 1:", "  File b"]
