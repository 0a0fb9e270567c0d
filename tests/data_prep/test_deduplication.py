import hashlib
import random
import shutil

import numpy as np
import pytest

from bitlm_dist.data_prep import near_duplicates
from bitlm_dist.data_prep.deduplication import Deduplicator
from bitlm_dist.data_prep.hash_index import HashIndex
from bitlm_dist.data_prep.near_duplicates import (
    MinHasher,
    band_keys,
    choose_bands,
    word_ngram_hashes,
)
from bitlm_dist.errors import UserError


def key(number):
    return hashlib.sha256(str(number).encode()).digest()[:16]


@pytest.mark.parametrize("held", [1, 10, 100, 10_000])
def test_the_index_is_a_dictionary_of_bounded_size(tmp_path, seed, held):
    rng = random.Random(seed)
    index = HashIndex(tmp_path, held)
    truth = {}

    # Keys that share their first or second half.
    keys = [key(i)[:8] + key(j)[8:] for i in range(40) for j in range(25)]
    for _ in range(60):
        batch = rng.choices(keys, k=40)
        stored = index.find_on_disk(batch)
        for x in batch:
            found = index.find_in_memory(x) if x not in stored else stored[x]
            assert found == truth.get(x)
            if found is None:
                index.add(x, len(truth))
                truth[x] = len(truth)
        index.spill_if_full()

    assert len(index._in_memory) < held
    assert sum(size for _, size in index._files) + len(index._in_memory) == len(truth)
    assert len(index._files) <= 11, "merging keeps files few"
    assert len(list(tmp_path.iterdir())) == len(index._files)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_first_copy_stays_whatever_the_batches(tmp_path, seed, batch, monkeypatch):
    monkeypatch.setattr("bitlm_dist.data_prep.hash_index.HashIndex.__init__.__defaults__", (5,))
    rng = random.Random(seed)
    hashes = [key(rng.randrange(60)) for _ in range(300)]
    deduplication = Deduplicator(tmp_path, exact=True, near_threshold=None)
    reasons = [
        r
        for i in range(0, 300, batch)
        for r in deduplication.drop_reasons(hashes[i : i + batch], None)
    ]
    expected = [None if hashes.index(h) == i else "duplicate" for i, h in enumerate(hashes)]
    assert reasons == expected


def jaccard(a, b):
    a = set(word_ngram_hashes(a).tolist())
    b = set(word_ngram_hashes(b).tolist())
    return len(a & b) / len(a | b)


def near_texts(rng, count):
    """Make texts, half of them changed copies of earlier ones."""
    texts = []
    for _ in range(count):
        words = [f"w{rng.randrange(5000)}" for _ in range(300)]
        if texts and rng.random() < 0.5:
            words = rng.choice(texts).split()
            for _ in range(rng.choice([0, 1, 2, 5, 15, 40])):
                words[rng.randrange(len(words))] = f"w{rng.randrange(5000)}"
        texts.append(" ".join(words))
    return texts


def test_signatures_estimate_the_similarity_of_brute_force(seed):
    pytest.importorskip("rensa")
    texts = near_texts(random.Random(seed), 60)
    signatures = MinHasher().signatures(texts)
    assert signatures.shape == (60, 128)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    true = np.array([jaccard(texts[i], texts[j]) for i, j in pairs])
    estimated = np.array([(signatures[i] == signatures[j]).mean() for i, j in pairs])
    error = np.sqrt(np.maximum(true * (1 - true), 1e-3) / 128)
    assert (np.abs(estimated - true) < 6 * error + 0.02).all()
    assert np.array_equal(MinHasher().signatures(texts[:3]), signatures[:3]), (
        "each document for itself"
    )
    assert MinHasher().signatures([]).shape == (0, 128)
    assert np.array_equal(*MinHasher().signatures(["Two words", "two  WORDS\n"]))


@pytest.mark.parametrize("batch", [1, 13, 1000])
def test_near_copies_of_what_stays_are_dropped(tmp_path, seed, batch, monkeypatch):
    pytest.importorskip("rensa")
    monkeypatch.setattr("bitlm_dist.data_prep.hash_index.HashIndex.__init__.__defaults__", (100,))
    texts = near_texts(random.Random(seed), 120)
    signatures = MinHasher().signatures(texts)
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    deduplication = Deduplicator(tmp_path, exact=True, near_threshold=0.8)
    reasons = []
    for i in range(0, len(texts), batch):
        reasons += deduplication.drop_reasons(hashes[i : i + batch], signatures[i : i + batch])

    kept: list[int] = []
    missed = 0
    for i, reason in enumerate(reasons):
        similarity = max(((signatures[i] == signatures[j]).mean() for j in kept), default=0.0)
        if reason == "near_duplicate":
            assert similarity >= 0.8
        elif reason is None:
            missed += similarity >= 0.8
            kept.append(i)
        else:
            assert hashes.index(hashes[i]) < i

    assert reasons.count("near_duplicate") > 10
    assert missed <= 3, "bands find 95 of 100 pairs just at the threshold, and more above"


def test_bands_find_what_they_promise():
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        bands, rows = choose_bands(threshold)
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= near_duplicates.MIN_RECALL
    signatures = np.arange(256, dtype=np.uint32).reshape(2, 128)
    signatures[1, :8] = signatures[0, :8]
    first, second = band_keys(signatures, 16, 8)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True] + [False] * 15
    signatures[:] = 7
    assert len(set(band_keys(signatures, 16, 8)[0])) == 16, (
        "the same values in another band are another key"
    )


def test_a_missing_rensa_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(UserError, match=r"pip install 'bitlm-dist\[dedup\]'"):
        MinHasher()


def test_work_on_disk_grows_and_memory_does_not(tmp_path):
    index = HashIndex(tmp_path / "x", max_in_memory=1000)
    for i in range(0, 20_000, 500):
        index.find_on_disk([key(j) for j in range(i, i + 500)])
        for j in range(i, i + 500):
            index.add(key(j), j)
        index.spill_if_full()
    assert index.find_on_disk([key(12_345), key(99_999)]) == {key(12_345): 12_345}
    shutil.rmtree(tmp_path / "x")
