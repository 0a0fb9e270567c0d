import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist.data.packing import PADDING, assemble, pack, packed_document

BOS, EOS = 0, 1


def documents(lengths):
    """Documents whose tokens are all different, so that each can be traced."""
    ends = np.cumsum(lengths) + 2
    return [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 5), st.integers(2, 8), st.randoms())
def test_every_token_is_a_target_exactly_once(lengths, block, blocks, rng):
    texts = documents(lengths)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    length = block * blocks
    plan = pack(np.array(lengths), np.array(order), block=block, sequence_length=length)
    targets = []
    for i in range(len(plan)):
        tokens, ids = assemble(plan.of(i), texts.__getitem__, block=block, sequence_length=length, bos=BOS, eos=EOS)
        assert len(tokens) == length
        for n in range(1, blocks):
            here, before = slice(n * block, (n + 1) * block), (n - 1) * block
            if ids[before] == ids[n * block] != PADDING:
                targets += [t for t in tokens[here].tolist() if t != EOS]
    assert sorted(targets) == sorted(t for text in texts for t in text.tolist())
    # in the order of the stream, too
    assert targets == [t for d in order for t in texts[d].tolist()]


@pytest.mark.parametrize(("length", "block", "expected"), [(0, 4, [0] * 4 + [1] * 4), (3, 4, [0] * 4 + [2, 3, 4, 1])])
def test_a_document_opens_with_bos_and_ends_with_eos_to_a_whole_block(length, block, expected):
    packed = packed_document(documents([length])[0], block=block, bos=BOS, eos=EOS)
    assert packed.tolist() == expected


def test_a_full_last_block_still_gets_an_eos():
    packed = packed_document(documents([4])[0], block=4, bos=BOS, eos=EOS)
    assert packed.tolist() == [0] * 4 + [2, 3, 4, 5] + [1] * 4


def test_documents_are_numbered_and_the_rest_is_padding():
    texts = documents([2, 3])
    plan = pack(np.array([2, 3]), np.arange(2), block=2, sequence_length=16)
    tokens, ids = assemble(plan.of(0), texts.__getitem__, block=2, sequence_length=16, bos=BOS, eos=EOS)
    assert tokens.tolist() == [0, 0, 2, 3, 1, 1, 0, 0, 4, 5, 6, 1] + [1] * 4
    assert ids.tolist() == [0] * 6 + [1] * 6 + [PADDING] * 4
