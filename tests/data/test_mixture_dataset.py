import json

import pytest
import torch
import yaml

from bitlm_dist.config_loading import load_config
from bitlm_dist.data.mixture_dataset import source_names, training_dataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def second(prepared, tmp_path_factory):
    """Prepare another folder with the same tokenizer, whose texts have a word of their own."""
    from bitlm_dist.data_prep.prepare import prepare

    root = tmp_path_factory.mktemp("second")
    (root / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"zebra {i} " * (5 + i % 7)}) for i in range(60))
    )
    prepare(
        [root / "text.jsonl"],
        str(prepared / "tokenizer" / "tokenizer.json"),
        root / "data",
        validation_fraction=0.05,
    )
    return root / "data"


@pytest.fixture
def mixed(tiny_file, prepared, second, tmp_path):
    """Return a function that makes the config of a mixture of both folders.

    It takes the weights of the two folders, overrides, and other keys of the second source.
    """

    def make(weights, *words, **more):
        document = yaml.safe_load(tiny_file.read_text())
        sources = [
            {"path": str(prepared), "weight": weights[0]},
            {"path": str(second), "weight": weights[1], **more},
        ]
        document["data"] |= {"path": str(prepared), "sources": sources}
        file = tmp_path / "mixed.yaml"
        file.write_text(yaml.safe_dump(document))
        return load_config(file, ["--run.dir", str(tmp_path / "run"), *words]).config

    return make


def test_sequences_come_from_both_in_their_shares(mixed, prepared, second):
    config = mixed([0.75, 0.25])
    feed = training_dataset(config)
    own = {
        folder: PackedDataset.from_folder(folder, config, "train", True)
        for folder in (prepared, second)
    }

    seen = dict.fromkeys(own, 0)
    for step in range(10):
        batch = feed.batch(8 * step, 8, CPU)
        assert batch.sequence_index.tolist() == list(range(8 * step, 8 * step + 8))
        for row in batch.tokens:
            folder = next(
                f
                for f, source in own.items()
                if torch.equal(row, source.batch(seen[f], 1, CPU).tokens[0])
            )
            seen[folder] += 1
        assert feed.sequences_per_source(step + 1) == {
            "sequences/data-0": seen[prepared],
            "sequences/data-1": seen[second],
        }

    assert seen == {prepared: 60, second: 20}
    for source in (feed, *own.values()):
        source.close()


def test_a_run_on_a_mixture_resumes_bitwise_and_logs_its_sources(mixed, tmp_path):
    weights = [[[0, 1.0], [6, 0.0]], [[0, 0.0], [6, 1.0]]]
    lines = []
    for folder, stops in (("whole", [8]), ("run", [3, 8])):
        config = mixed(weights, "--run.dir", str(tmp_path / folder), "--training.steps", "8")
        for until in stops:
            trainer = Trainer.build(config).open()
            trainer.fit(until=until)
            trainer.close()
        lines.append(
            [
                json.loads(line)
                for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
            ]
        )

    keep = ("loss", "sequences/data-0", "sequences/data-1")
    assert [[line[key] for key in keep] for line in lines[0]] == [
        [line[key] for key in keep] for line in lines[1]
    ]
    assert lines[0][0]["sequences/data-1"] == lines[0][0]["epochs/data-1"] == 0
    for name, feed in zip(("data-0", "data-1"), trainer.dataset._datasets, strict=True):
        for line in lines[1]:
            assert line[f"epochs/{name}"] == pytest.approx(line[f"sequences/{name}"] / len(feed))
    assert sum(lines[0][-1][key] for key in keep[1:]) == 64

    with pytest.raises(UserError, match="holds a run with data.sources = .*, now"):
        Trainer.build(
            mixed([0.5, 0.5], "--run.dir", str(tmp_path / "run"), "--training.steps", "8")
        ).open()


def test_an_epoch_may_be_capped(mixed, second):
    config = mixed([0.5, 0.5], "--training.steps", "100", max_epochs=2)
    feed = training_dataset(config)
    source = PackedDataset.from_folder(second, config, "train", True)
    used = feed.sequences_per_source(100)["sequences/data-1"]
    assert 2 * len(source) - 8 < used <= 2 * len(source) < 400
    assert "data-0: " in feed.summary()
    assert "data-1: " in feed.summary()
    total = sum(map(len, feed._datasets))
    assert not feed.warnings(total - 1)
    assert len(feed.warnings(total)) == 1
    feed.close()
    source.close()


def test_too_little_data_is_found_before_the_first_step(mixed):
    with pytest.raises(
        UserError,
        match="no source has anything left at step .*: raise max_epochs or lower training.steps",
    ):
        Trainer.build(mixed([0.0, 1.0], "--training.steps", "400", max_epochs=1)).open()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.4], "the weights add up to 0.9 at step 0: they must add up to 1"),
        ([[[0, 1.0], [10, 0.0]], 0.0], "the weights add up to 0 at step 10"),
        (
            [[[5, 0.5], [5, 0.5]], 0.5],
            r"the weight of .* must be a share, or \[step, share\] pairs with steps that ascend",
        ),
        ([1.5, -0.5], "must be a share"),
    ],
)
def test_weights_that_are_none_are_refused(mixed, weights, message):
    with pytest.raises(UserError, match=f"data.sources: .*{message}"):
        mixed(weights)


def test_sources_without_data_path_and_other_tokenizers_are_refused(
    mixed, tiny, tiny_file, corpus, tmp_path, prepared
):
    from bitlm_dist.data_prep.prepare import prepare

    with pytest.raises(UserError, match="data.sources needs data.path too"):
        mixed([0.5, 0.5], "--data.path", "null")
    other = tmp_path / "other"
    prepare([corpus], "bpe:310", other, validation_fraction=0.1)
    file = tmp_path / "two.yaml"
    document = yaml.safe_load(tiny_file.read_text())
    document["data"] |= {
        "path": str(prepared),
        "sources": [{"path": str(p), "weight": 0.5} for p in (prepared, other)],
    }
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(
        UserError, match="data.sources: other was prepared with another tokenizer than data"
    ):
        training_dataset(load_config(file, []).config)


def test_names():
    from pathlib import Path

    assert source_names([Path("a/x"), Path("b/x"), Path("c/y")]) == ["x-0", "x-1", "y"]
