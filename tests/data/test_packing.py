import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist.data import packing
from bitlm_dist.data.packing import (
    PADDING_ID,
    assemble_sequence,
    max_targets_per_sequence,
    num_packed_blocks,
    pack,
    pack_document,
)

BOS = 0
EOS = 1
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=20)
ANY_PLAN = {
    "lengths": LENGTHS,
    "block": st.integers(1, 5),
    "blocks": st.integers(2, 8),
    "window": st.integers(1, 9),
    "rng": st.randoms(),
}


def documents(lengths):
    """Make documents whose tokens are all different, so that each token can be traced."""
    ends = np.cumsum(lengths) + 2
    return [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize("packer", packing.PACKERS)
@settings(deadline=None, max_examples=200)
@given(**ANY_PLAN)
def test_every_token_is_a_target_exactly_once(packer, lengths, block, blocks, window, rng):
    texts = documents(lengths)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    length = block * blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BEST_FIT_WINDOW", window)
        plan = pack(
            np.array(lengths),
            np.array(order),
            block_size=block,
            sequence_length=length,
            packer=packer,
        )

    targets = []
    padding = 0
    seen = 0
    for i in range(len(plan)):
        tokens, ids = assemble_sequence(
            plan.spans_of_sequence(i),
            texts.__getitem__,
            block_size=block,
            sequence_length=length,
            bos=BOS,
            eos=EOS,
        )
        assert len(tokens) == length
        padding += (ids == PADDING_ID).sum()
        seen += length
        for n in range(1, blocks):
            here = slice(n * block, (n + 1) * block)
            before = (n - 1) * block
            if ids[before] == ids[n * block] != PADDING_ID:
                targets += [t for t in tokens[here].tolist() if t != EOS]

    assert sorted(targets) == sorted(t for text in texts for t in text.tolist())
    if packer == "greedy":
        # In the order of the stream, too.
        assert targets == [t for d in order for t in texts[d].tolist()]
    else:
        # Only documents that are longer than a sequence are cut.
        assert set(plan.document_spans[plan.document_spans[:, 1] > 0, 0]) == {
            d for d, n in enumerate(lengths) if 2 + n // block > blocks
        }

    assert plan.stats.padding_fraction == pytest.approx(padding / seen)
    again = len(plan.document_spans) - len(lengths)
    assert plan.stats.repeated_fraction == pytest.approx(again * block / seen)
    assert plan.stats.cut_fraction == pytest.approx(
        sum(1 for d in order if (plan.document_spans[:, 0] == d).sum() > 1) / len(lengths)
    )


def test_best_fit_cuts_fewer_documents_and_needs_no_more_sequences(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(1 / 300, 5000).astype(np.int64)
    plans = {
        p: pack(lengths, rng.permutation(5000), block_size=4, sequence_length=1024, packer=p)
        for p in packing.PACKERS
    }
    assert plans["best_fit"].stats.cut_fraction < plans["greedy"].stats.cut_fraction / 4
    assert len(plans["best_fit"]) < 1.01 * len(plans["greedy"])
    assert plans["best_fit"].stats.padding_fraction < 0.01


def test_packing_by_hand():
    """Sequences of four blocks, and documents of 2 + n // 4 blocks: 3, 2, 6 and 2."""
    plans = {
        p: pack(np.array([4, 0, 16, 0]), np.arange(4), block_size=4, sequence_length=16, packer=p)
        for p in packing.PACKERS
    }
    greedy, best = (
        [p.spans_of_sequence(i).tolist() for i in range(len(p))] for p in plans.values()
    )
    assert greedy == [
        [[0, 0, 3], [1, 0, 1]],
        [[1, 0, 2], [2, 0, 2]],
        [[2, 1, 4]],
        [[2, 4, 2], [3, 0, 2]],
    ]
    assert best == [[[0, 0, 3]], [[1, 0, 2], [3, 0, 2]], [[2, 0, 4]], [[2, 3, 3]]]


@pytest.mark.parametrize(
    ("length", "block", "expected"), [(0, 4, [0] * 4 + [1] * 4), (3, 4, [0] * 4 + [2, 3, 4, 1])]
)
def test_a_document_opens_with_bos_and_ends_with_eos_to_a_whole_block(length, block, expected):
    packed = pack_document(documents([length])[0], block_size=block, bos=BOS, eos=EOS)
    assert packed.tolist() == expected


def test_a_full_last_block_still_gets_an_eos():
    packed = pack_document(documents([4])[0], block_size=4, bos=BOS, eos=EOS)
    assert packed.tolist() == [0] * 4 + [2, 3, 4, 5] + [1] * 4


def test_documents_are_numbered_and_the_rest_is_padding():
    texts = documents([2, 3])
    plan = pack(np.array([2, 3]), np.arange(2), block_size=2, sequence_length=16)
    tokens, ids = assemble_sequence(
        plan.spans_of_sequence(0),
        texts.__getitem__,
        block_size=2,
        sequence_length=16,
        bos=BOS,
        eos=EOS,
    )
    assert tokens.tolist() == [0, 0, 2, 3, 1, 1, 0, 0, 4, 5, 6, 1] + [1] * 4
    assert ids.tolist() == [0] * 6 + [1] * 6 + [PADDING_ID] * 4


def targets_per_sequence(plan):
    """Blocks of each sequence that are not the first of their span."""
    spans = [plan.spans_of_sequence(i) for i in range(len(plan))]
    return [int(each[:, 2].sum()) - len(each) for each in spans]


@pytest.mark.parametrize("packer", packing.PACKERS)
@settings(deadline=None, max_examples=200)
@given(**ANY_PLAN)
def test_no_sequence_has_more_targets_than_the_bound(packer, lengths, block, blocks, window, rng):
    lengths = np.array(lengths)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BEST_FIT_WINDOW", window)
        plan = pack(
            lengths,
            np.array(order),
            block_size=block,
            sequence_length=block * blocks,
            packer=packer,
        )
    bound = max_targets_per_sequence(lengths, block, blocks)
    assert max(targets_per_sequence(plan)) <= bound < blocks


@pytest.mark.parametrize("length", [0, 5, 9, 40])
@pytest.mark.parametrize("blocks", [2, 7, 8])
def test_the_bound_is_reached_by_documents_of_one_length(length, blocks):
    """The first sequence of a stream begins with a whole document, so it has the most."""
    lengths = np.full(20, length)
    plan = pack(lengths, np.arange(20), block_size=4, sequence_length=4 * blocks)
    bound = max_targets_per_sequence(lengths, 4, blocks)
    assert max(targets_per_sequence(plan)) == bound
    assert bound == blocks - -(-blocks // int(num_packed_blocks(np.array(length), 4)))


def test_the_bound_of_a_few_documents_is_all_that_they_have():
    # two documents of 3 and 2 blocks do not fill a sequence of 8
    assert max_targets_per_sequence(np.array([4, 1]), 4, 8) == 3
