"""A run that resumes with another mixture or batch reads on where each of its sources stopped."""

import copy
import json
import pickle

import pytest
import torch

from bitlm_dist.config_loading import load_config
from bitlm_dist.data.loader import Loader
from bitlm_dist.data.mixture_dataset import training_dataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.errors import UserError
from bitlm_dist.model.batch import TargetFinder
from bitlm_dist.training.data_resumption import mixture_state_dict, resume_dataset
from bitlm_dist.training.run_claim import GLOBAL_BATCH_KEY
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")
ALLOWED = ["--data.new_mixture", "true"]
DOUBLED = ["--training.global_batch_tokens", "512", "--checkpoint.new_global_batch", "true"]


@pytest.fixture(scope="module")
def folders(prepared, tmp_path_factory):
    """Two more folders with the tokenizer of ``prepared``, each with its own word."""
    from bitlm_dist.data_prep.prepare import prepare

    root = tmp_path_factory.mktemp("more")
    found = {"base": prepared}
    for word in ("zebra", "yak"):
        (root / f"{word}.jsonl").write_text(
            "\n".join(json.dumps({"text": f"{word} {i} " * (5 + i % 7)}) for i in range(60))
        )
        prepare(
            [root / f"{word}.jsonl"],
            str(prepared / "tokenizer" / "tokenizer.json"),
            root / word,
            validation_fraction=0.05,
        )
        found[word] = root / word

    return found


@pytest.fixture
def config_of(tiny_file, folders, tmp_path):
    """Function that makes a config of weights by folder, overrides, and where the folders are now.

    Without weights the config has ``data.path`` alone.
    """

    def make(weights, *words, **moved):
        places = {**folders, **moved}
        sources = [
            {"path": str(places[name]), "weight": weight} for name, weight in weights.items()
        ]
        words = [
            "--run.dir",
            str(tmp_path / "run"),
            "--data.path",
            str(folders["base"]),
            "--training.steps",
            "8",
            *words,
        ]

        return load_config(tiny_file, [*words, "--data.sources", json.dumps(sources)]).config

    return make


@pytest.mark.slow
def test_every_source_is_read_on_through_changes_of_mixture_and_batch(
    config_of, folders, monkeypatch
):
    read = []
    monkeypatch.setattr(
        Loader, "get", lambda loader, get=Loader.get: read.append(get(loader)) or read[-1]
    )
    both = {"base": 0.5, "zebra": 0.5}
    other = {"yak": 0.25, "zebra": 0.75}

    for weights, words, until in (
        ({}, [], 1),
        (both, ALLOWED, 3),
        (other, [*ALLOWED, *DOUBLED], 5),
        (other, DOUBLED, 6),  # resumes without a change
        ({}, [*ALLOWED, *DOUBLED], 8),
    ):
        trainer = Trainer.build(config_of(weights, *words)).open()
        trainer.fit(until=until)
        trainer.close()

    rows = torch.cat([batch.tokens for batch in read])
    assert torch.cat([batch.sequence_index for batch in read]).tolist() == list(
        range(3 * 8 + 5 * 16)
    )

    feeds = {
        name: PackedDataset.from_folder(folder, config_of({}), "train", True)
        for name, folder in folders.items()
    }
    seen = dict.fromkeys(feeds, 0)
    names = []

    for row in rows:
        names += [
            name
            for name, feed in feeds.items()
            if torch.equal(row, feed.batch(seen[name], 1, CPU).tokens[0])
        ]
        seen[names[-1]] += 1

    assert len(names) == len(rows), "each row is the next one of one source"
    assert set(names[:8]) == {"base"}
    assert [names[8:24].count(name) for name in folders] == [8, 8, 0]
    assert [names[24:72].count(name) for name in folders] == [0, 36, 12]
    assert set(names[72:]) == {"base"}

    for feed in feeds.values():
        feed.close()


class KilledError(Exception):
    pass


def kill(metrics):
    raise KilledError


def test_without_the_key_another_mixture_is_refused(config_of, folders, tmp_path):
    trainer = Trainer.build(config_of({"base": 0.5, "zebra": 0.5})).open()
    trainer.fit(until=1)
    trainer.close()
    with pytest.raises(
        UserError, match=r"data.sources = .*, now .* \(data.new_mixture = true allows it\)"
    ):
        Trainer.build(config_of({"base": 0.4, "zebra": 0.6})).open()

    # killed between the change and its first checkpoint: the folder's config has the new mixture,
    # the checkpoint the old one
    changed = config_of({"base": 0.4, "zebra": 0.6}, *ALLOWED)
    trainer = Trainer.build(changed).open()
    trainer.add_hook(kill)
    with pytest.raises(KilledError):
        trainer.fit()
    trainer.close()

    with pytest.raises(
        UserError,
        match=r"was trained with another data.sources .*; data.new_mixture = true allows it",
    ):
        Trainer.build(config_of({"base": 0.4, "zebra": 0.6})).open()

    # the same data elsewhere, under another name, is the same mixture
    moved = tmp_path / "stripes"
    moved.symlink_to(folders["zebra"])
    Trainer.build(config_of({"base": 0.5, "zebra": 0.5}, *ALLOWED, zebra=moved)).open().close()


def test_worker_processes_read_the_same(config_of):
    config = config_of({"base": 0.5, "zebra": 0.5})
    state = state_of(config, step=3, sequence=24)
    changed = config_of({"base": 0.1, "zebra": 0.9}, *ALLOWED)
    feed = resumed(changed, state)
    finder = TargetFinder(changed.model.block_size, eos=1, micro_batch_size=8)
    loader = Loader(
        changed,
        feed,
        finder,
        start_step=3,
        first_sequence=24,
        num_sequences=8,
        stride=8,
        device=CPU,
    )
    loader._step_dataset.dataset = None
    steps = pickle.loads(pickle.dumps(loader._step_dataset))
    assert torch.equal(steps[5].tokens, feed.batch(40, 8, CPU).tokens)
    loader.close()
    steps.dataset.close()
    feed.close()


def test_fewer_steps_than_an_earlier_mixture_took_are_no_obstacle(config_of):
    state = state_of(config_of({"base": 0.5, "zebra": 0.5}), step=6, sequence=48)
    feed = resumed(config_of({"base": 0.1, "zebra": 0.9}, *ALLOWED, "--training.steps", "4"), state)
    assert feed.origin.step == 6
    feed.close()


def test_checkpoints_without_a_record_continue(config_of):
    """Checkpoints of earlier versions."""
    plain = config_of({})
    mixed = config_of({"base": 0.5, "zebra": 0.5}, *ALLOWED)
    for config in (plain, mixed):
        state = state_of(config, step=3, sequence=24)
        del state["mixture"]
        feed = resumed(config, state)
        assert (feed.origin.step, feed.sequences_read(3, 24)) == (
            0,
            state_of(config, 3, 24)["mixture"]["taken"],
        )
        feed.close()

    old = state_of(plain, step=3, sequence=24)
    del old["mixture"]
    feed = resumed(mixed, old)
    assert feed.origin.step == 3
    assert list(feed.origin.taken.values()) == [24]
    feed.close()

    old = state_of(mixed, step=3, sequence=24)
    del old["mixture"]
    for words in ({"base": 0.1, "zebra": 0.9}, ALLOWED), ({"base": 0.5, "zebra": 0.5}, DOUBLED):
        with pytest.raises(UserError, match="did not record what was read of each source"):
            resumed(config_of(words[0], *words[1]), old)


def state_of(config, step, sequence):
    """The state that a checkpoint would hold."""
    feed = training_dataset(config)
    tokens = config.training.global_batch_tokens
    per_step = sequence // step
    state = {
        "step": step,
        "next_sequence": sequence,
        "mixture": mixture_state_dict(feed, per_step, step, sequence),
        "fingerprint": {**feed.fingerprint(), GLOBAL_BATCH_KEY: tokens},
        "config": config.model_dump(mode="json"),
    }

    feed.close()
    return copy.deepcopy(state)


def resumed(config, state):
    feed = training_dataset(config)
    return resume_dataset(
        feed,
        config,
        {**feed.fingerprint(), GLOBAL_BATCH_KEY: config.training.global_batch_tokens},
        "step-3",
        state,
    )
