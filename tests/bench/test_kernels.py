import json

import pytest
from typer.testing import CliRunner

from bitlm_dist.bench import kernels
from bitlm_dist.cli import app
from bitlm_dist.errors import UserError
from bitlm_dist.kernels.bench import AttentionShape, KernelTiming

FEW = (
    "--length",
    32,
    "--length",
    64,
    "--batch",
    2,
    "--heads",
    2,
    "--width",
    16,
    "--block",
    4,
    "--repeats",
    2,
)


def run(*words):
    result = CliRunner().invoke(
        app, ["bench", *(str(word) for word in words)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_attention_is_measured_on_the_exact_mask(tmp_path):
    out, plot = tmp_path / "r.json", tmp_path / "r.svg"
    words = ("attention", *FEW, "--kv-heads", 1, "--documents", 2, "--dtype", "float32")
    found = json.loads(run(*words, "--json", "--out", out, "--plot", plot))
    assert json.loads(out.read_text()) == found
    assert plot.read_text().startswith("<?xml")
    for results, length in zip(found["results"], (32, 64), strict=True):
        half = length // 2
        pairs = {
            "causal flash": 2 * sum(i + 1 for i in range(length)),
            "SDPA, dense mask": 2
            * sum(
                j // 4 <= i // 4 and i // half == j // half
                for i in range(length)
                for j in range(length)
            ),
        }
        assert {"merge", "reference", *pairs} <= results["sides"].keys()
        for name, side in results["sides"].items():
            seen = pairs.get(name, pairs["SDPA, dense mask"])
            assert side["forward_work"] == 4 * 2 * 16 * seen, name  # 2 heads of width 16
            assert side["backward_work"] == 10 * 2 * 16 * seen
            assert len(side["forward"]) == len(side["backward"]) == 2
            assert min(side["forward"] + side["backward"]) > 0
            assert side["peak_bytes"] >= 0
    table = run("attention", *FEW, "--backend", "merge")
    assert "64 tokens" in table
    assert "reference" not in table
    assert "batch 2, heads 2, kv_heads 2" in table


def test_attention_inside_blocks_is_measured_in_bytes():
    found = json.loads(run("in-block", *FEW, "--dtype", "float32", "--json"))["results"][1]
    assert {"torch", "SDPA of blocks", "copy"} <= found["sides"].keys()
    column = 2 * 64 * 2 * 16 * 4  # rows, tokens, heads, width, bytes of a number
    for side in found["sides"].values():
        assert (side["forward_work"], side["backward_work"]) == (4 * column, 7 * column)


def test_repeats_of_all_lengths_are_counted():
    done = []
    shapes = [AttentionShape(1, length, 1, 1, 8, 4) for length in (8, 16)]
    kernels.bench_kernels("in-block", shapes, 2, ["torch"], done.append)
    assert done == [1, 2, 3, 4]


def test_a_side_is_plotted_over_the_lengths_that_it_supports(monkeypatch, tmp_path):
    def results(length, **milliseconds):
        sides = {
            name: KernelTiming([1e-3 * time], [0.0], 1, 1, 2**20)
            for name, time in milliseconds.items()
        }
        shape = AttentionShape(1, length, 1, 1, 8, 4)
        return kernels.KernelResults("attention", shape, sides, None)

    figures = []
    monkeypatch.setattr(kernels, "save_plot", lambda figure, file: figures.append(figure))
    kernels.plot_kernel_results([results(64, a=3, b=4), results(16, a=1)], tmp_path / "x.svg")
    times, memory = figures[0].axes
    points = [[(*line.get_xdata(),), (*line.get_ydata(),)] for line in times.lines]
    assert points == [[(16, 64), (1, 3)], [(64,), (4,)]]
    assert [line.get_label() for line in memory.lines] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("attention", "--backend", "fax"), "backend 'fax' does not exist: choose from"),
        (("attention", "--block", "0"), "--block 0: must be at least 1"),
        (("attention", "--kv-heads", "3"), "--heads 8 is no multiple of --kv-heads 3"),
        (("attention", "--kv-heads", "0"), "--kv-heads 0: must be at least 1"),
        (("in-block", "--length", "1022"), "--length 1022 is no multiple of --block 4"),
        (("in-block", "--dtype", "int8"), "--dtype int8: choose from float32, float16, bfloat16"),
        (("in-block", "--plot", "x.txt"), "--plot x.txt"),
        (("in-block", "--backend", "dense"), "in-block attention backend 'dense' does not exist"),
    ],
)
def test_wrong_options_are_named(words, message):
    with pytest.raises(UserError, match=message):
        run(*words)
