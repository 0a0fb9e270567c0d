import importlib
import json
from contextlib import closing, contextmanager
from multiprocessing import Pipe
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitlm_dist.bench import interleaved
from bitlm_dist.bench.interleaved import Variant, time_interleaved
from bitlm_dist.bench.results import read_results
from bitlm_dist.cli import app
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.errors import UserError


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def variants(monkeypatch):
    """Module that the child processes can import, too."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("variants")


@pytest.mark.distributed
def test_variants_take_turns_and_warm_up_unseen(tmp_path, variants):
    order = tmp_path / "order"
    phases = []

    @contextmanager
    def show(what, total=None, unit="", *, animated=True):
        done = []
        yield done.append
        phases.append((what, total, done))

    timings = time_interleaved(
        {n: Variant(variants.Counter, (order, n)) for n in "ab"}, repeats=3, warmup=2, show=show
    )
    assert order.read_text() == "ab" * 5
    assert phases == [
        ("setting up a", None, []),
        ("setting up b", None, []),
        ("measuring", 10, list(range(1, 11))),
    ]
    assert all(
        len(t.tokens_per_second) == 3
        and t.spread[0] <= t.median <= t.spread[1]
        and t.peak_bytes > 2**20
        for t in timings.values()
    )


@pytest.mark.distributed
def test_a_failure_in_a_child_is_one_line(variants):
    with pytest.raises(UserError, match="^b failed: RuntimeError: no luck today$"):
        time_interleaved({"b": Variant(variants.broken, ())}, repeats=1, warmup=0)


@pytest.mark.parametrize("has_unread_request", [False, True])
def test_a_child_that_was_killed_between_two_repeats_is_named(has_unread_request):
    ours, its = Pipe()
    if has_unread_request:
        ours.send("run")
    its.close()
    with pytest.raises(UserError, match="^b was killed, most likely for want of memory"):
        interleaved._request("b", ours, "run")


@pytest.mark.distributed
def test_train_bench_compares_three_ways_and_its_file_can_be_read_again(tiny, prepared, tmp_path):
    out, plot = tmp_path / "r.json", tmp_path / "r.svg"
    words = (
        "bench",
        "train",
        tiny.file,
        "--data.path",
        prepared,
        "--vs",
        "softmax",
        "--vs",
        "plain",
    )
    found = json.loads(
        run(*words, "--repeats", "2", "--steps", "2", "--json", "--out", out, "--plot", plot)
    )
    assert json.loads(out.read_text()) == found
    assert set(found["sides"]) == {"bits", "softmax", "plain"}
    assert set(found["ratio_tokens_per_second"]) == {"softmax", "plain"}
    for side in found["sides"].values():
        rate = side["tokens_per_second"]
        assert rate["lowest"] <= rate["median"] <= rate["highest"]
        assert len(rate["all"]) == 2
        assert side["mfu"] is None
        assert side["peak_bytes"] > 2**20
    shares = {
        n: s["predicted_tokens_per_second"] / s["tokens_per_second"]["median"]
        for n, s in found["sides"].items()
    }
    split = json.loads((prepared / "manifest.json").read_text())["splits"]["train"]
    for name, block in (("bits", 4), ("softmax", 1)):
        with closing(
            PackedDataset(
                prepared, "train", block_size=block, sequence_length=32, seed=0, shuffle=True
            )
        ) as feed:
            assert shares[name] == pytest.approx(
                (split["tokens"] + split["documents"]) / (32 * len(feed))
            )
    assert shares["plain"] == pytest.approx(1 - 4 / 32), (
        "of synthetic text only the first block is not predicted"
    )
    ratios = found["ratio_tokens_per_second"], found["ratio_predicted_tokens_per_second"]
    assert ratios[1]["softmax"] / ratios[0]["softmax"] == pytest.approx(
        shares["bits"] / shares["softmax"]
    )
    assert found["settings"]["vocabulary"] == 300
    assert plot.read_text().startswith("<?xml")
    assert "tokens/s, median" in run("bench", "show", out, "--plot", tmp_path / "again.png")
    for side in found["sides"].values():  # as a version wrote it that did not count them
        del side["predicted_tokens_per_second"]
    out.write_text(json.dumps(found))
    assert "predicted" in run("bench", "show", out)  # "tokens/s" may stand on the next line
    out.write_text(json.dumps({**found, "version": 99}))
    with pytest.raises(
        UserError, match=r"holds results of version 99, this program reads 2: run the bench again"
    ):
        read_results(out)


@pytest.mark.slow
def test_generate_bench_takes_several_samplers(tiny):
    words = (
        "bench",
        "generate",
        tiny.file,
        "--vocabulary",
        "300",
        "--vs",
        "softmax",
        "--batch",
        "2",
        "--tokens",
        "8",
    )
    found = json.loads(
        run(*words, "--sampler", "sequential", "--sampler", "ode:3", "--repeats", "1", "--json")
    )
    assert list(found["sides"]) == ["bits sequential", "bits ode:3", "softmax"]
    assert set(found["ratio_tokens_per_second"]) == {"bits ode:3", "softmax"}
    assert all(side["seconds_before"] > 0 for side in found["sides"].values())


BAD = [
    (["train", "--repeats", "0"], "--repeats 0: must be at least 1"),
    (["train", "--steps", "0"], "--steps 0: must be at least 1"),
    (["train", "--vs", "gpt"], "--vs gpt: compare with softmax or plain"),
    (["train", "--vocabulary", "1"], "--vocabulary 1: must be at least 4"),
    (["train"], "how many tokens are there"),
    (["train", "--plot", "x.txt", "--vocabulary", "300"], "--plot x.txt: name a file that ends in"),
    (
        ["train", "--vocabulary", "300", "--vs", "plain", "--model.output", "softmax"],
        "--vs plain compares model.output = bits",
    ),
    (
        ["train", "--vocabulary", "300", "--vs", "softmax", "--model.output", "softmax"],
        "--vs softmax: model.output is that already",
    ),
    (["train", "--vocabulary", "4000000000"], "the models need about bits .* GiB"),
    (["generate", "--vocabulary", "300", "--prompt", "-1"], "--prompt -1: must be at least 0"),
    (["generate", "--vocabulary", "300", "--vs", "plain"], "use it with `bitlm bench train`"),
    (
        ["generate", "--vocabulary", "300", "--sampler", "euler"],
        "--sampler euler: write sequential, ode:K",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_benches_are_refused_in_one_line(words, message, tiny):
    with pytest.raises(UserError, match=message) as caught:
        run("bench", words[0], tiny.file, *words[1:])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no bench results"),
        ('{"version": 2}', "lacks environment, first, kind"),
        ("x", "holds no JSON"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_results_are_named(content, message, tmp_path):
    file = tmp_path / "r.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        run("bench", "show", file)


@pytest.mark.slow
def test_data_bench_times_reading_cold_and_warm_beside_training(tiny_file, prepared):
    found = run(
        "bench",
        "data",
        tiny_file,
        "--data.path",
        prepared,
        "--repeats",
        "2",
        "--batches",
        "4",
        "--json",
    )
    results = json.loads(found)
    assert list(results["sides"]) == ["data, cold", "data, warm", "training"]
    rates = {name: side["tokens_per_second"] for name, side in results["sides"].items()}
    assert all(len(rate["all"]) == 2 for rate in rates.values())
    cold, training = rates["data, cold"]["median"], rates["training"]["median"]
    assert results["ratio_tokens_per_second"]["training"] == pytest.approx(cold / training)
    with pytest.raises(UserError, match="data.path is not set"):
        run("bench", "data", tiny_file)
