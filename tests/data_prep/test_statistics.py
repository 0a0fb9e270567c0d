import numpy as np
import pytest

from bitlm_dist.data_prep import statistics


def plainly(documents, vocabulary):
    """Compute the statistics directly by the formulas, with dense matrices over all tokens."""
    counts = np.bincount(np.concatenate(documents), minlength=vocabulary)
    frequent = np.argsort(-counts, kind="stable")[: statistics.MAX_CONTEXT_TOKENS]
    place = {token: i for i, token in enumerate(frequent.tolist())}
    pairs = np.zeros((vocabulary, 2 * len(frequent)))
    for document in documents:
        for before, after in zip(document[:-1].tolist(), document[1:].tolist(), strict=True):
            if before in place:
                pairs[after, place[before]] += 1
            if after in place:
                pairs[before, len(frequent) + place[after]] += 1
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(
            pairs * pairs.sum() / (pairs.sum(1, keepdims=True) * pairs.sum(0, keepdims=True))
        )
    pmi = np.maximum(np.nan_to_num(pmi, nan=0.0, neginf=0.0), 0.0).astype(np.float32)
    _, vectors = np.linalg.eigh(pmi.T.astype(np.float64) @ pmi)
    return counts, pmi @ vectors[:, ::-1][:, : statistics.MAX_CONTEXT_DIM]


def corpus(seed, vocabulary, documents=60):
    rng = np.random.default_rng(seed)
    law = 1 / np.arange(1, vocabulary + 1)
    return [
        rng.choice(vocabulary, rng.integers(1, 400), p=law / law.sum()).astype(np.uint16)
        for _ in range(documents)
    ]


@pytest.mark.parametrize("vocabulary", [40, 700])
def test_small_vocabularies_follow_the_formulas(seed, vocabulary, monkeypatch):
    monkeypatch.setattr(statistics, "BATCH_TOKENS", 1000)
    documents = corpus(seed, vocabulary)
    counts, contexts = statistics.token_statistics(lambda: documents, vocabulary)
    expected_counts, expected = plainly(documents, vocabulary)
    assert np.array_equal(counts, expected_counts)
    assert np.abs(contexts @ contexts.T - expected @ expected.T).max() < 1e-3


def test_large_vocabularies_are_counted_sparsely_with_the_same_outcome(seed, monkeypatch):
    documents = corpus(seed, 800)
    monkeypatch.setattr(statistics, "BATCH_TOKENS", 1000)
    column = np.arange(900, dtype=np.int32) % 600 - 88  # some tokens are not context
    context = statistics.ContextTokens(np.arange(900), column, 1024)
    counts, dense = statistics.token_statistics(lambda: documents, 900)

    cells = statistics.count_pairs(documents, context)
    monkeypatch.setattr(statistics, "ROWS", 850)  # no fewer than the tokens that occur

    parts = [
        statistics.count_pairs(documents[i : i + 7], context) for i in range(0, len(documents), 7)
    ]
    for other in (
        statistics.count_pairs(documents, context),
        statistics.merge_pair_counts(parts, context),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(cells, other, strict=True))

    again, sparse = statistics.token_statistics(lambda: documents, 900)
    assert np.array_equal(again, counts)
    assert np.abs(sparse @ sparse.T - dense @ dense.T).max() < 1e-3

    monkeypatch.setattr(statistics, "ROWS", 100)
    _, rough = statistics.token_statistics(lambda: documents, 900)
    assert not rough[counts == 0].any()
    assert (rough[counts > 1] ** 2).sum() > 0.2 * (dense[counts > 1] ** 2).sum()


def test_one_document_of_one_token():
    counts, contexts = statistics.token_statistics(lambda: [np.array([3], dtype=np.uint16)], 5)
    assert counts.tolist() == [0, 0, 0, 1, 0]
    assert not contexts.any()
