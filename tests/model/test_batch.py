from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist.model.batch import Batch, TargetFinder, TargetIndex, loss_mask

EOS = 1


def packed(document_blocks, rows=2, block=4):
    """Sequences whose documents have these numbers of blocks, the last token of each an EOS."""
    tokens = torch.randint(2, 300, (rows, sum(document_blocks) * block))
    ids = torch.cat([torch.full((n * block,), i) for i, n in enumerate(document_blocks)])
    ends = torch.tensor(document_blocks).cumsum(0) * block
    tokens[:, [int(end) - 1 for end in ends]] = EOS
    return Batch(tokens, ids.expand(rows, -1).contiguous(), torch.arange(rows))


def predicted(index, batch, block):
    """Tokens [B, S] that are the target of a block, and those that follow a state, as counts."""
    in_block = torch.zeros(batch.tokens.shape, dtype=torch.int64)
    in_block.view(-1, block).index_add_(0, index.target_blocks, index.valid.long())
    next_to = torch.zeros_like(in_block)
    next_to.view(-1).index_add_(0, index.next_positions, index.next_valid.long())
    return in_block, next_to


@settings(max_examples=50)
@given(
    blocks=st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda b: sum(b) > 1),
    block=st.integers(1, 4),
    capacity=st.integers(0, 9),
)
def test_every_token_of_the_mask_is_found_once(blocks, block, capacity):
    batch = packed(blocks, block=block)
    mask = loss_mask(batch, block, EOS).long()
    finder = TargetFinder(block, EOS, has_next_token_loss=True)
    index = finder.find(batch)
    for found in (index, finder.find(batch, len(index.target_blocks) + capacity)):
        for counts in predicted(found, batch, block):
            assert torch.equal(counts, mask)

    # the context of a target is the block before it, and the state of a token the one before it
    assert torch.equal(index.context_blocks + 1, index.target_blocks)
    assert torch.equal(index.states + 1, index.next_positions)


def test_padding_repeats_real_entries_and_is_not_valid(seed):
    batch = packed([3, 5])
    finder = TargetFinder(4, EOS, has_next_token_loss=True)
    exact = finder.find(batch)
    padded = finder.find(batch, 20)
    assert [len(part) for part in padded] == [20, 20, 20, 80, 80, 80]

    for name, part in padded._asdict().items():
        real = getattr(exact, name)
        assert torch.equal(part[: len(real)], real)
        rest = part[len(real) :]
        in_turn = torch.stack([real[i % len(real)] for i in range(len(real), len(part))])
        assert torch.equal(rest, torch.zeros_like(rest) if part.dtype == torch.bool else in_turn)


def test_a_microbatch_without_targets_has_only_padding():
    batch = packed([1, 1, 1, 1])  # documents of a BOS block alone
    index = TargetFinder(4, EOS, has_next_token_loss=True).find(batch, 8)
    assert not index.valid.any()
    assert not index.next_valid.any()
    assert not any(part.any() for part in index)


def test_targets_beyond_the_capacity_are_an_error():
    finder = TargetFinder(4, EOS, has_next_token_loss=False)
    with pytest.raises(AssertionError, match="14 targets in room for 13"):
        finder.find(packed([8]), 13)


@pytest.mark.parametrize("has_next_token_loss", [False, True])
def test_ranks_of_a_context_split_find_each_target_once(has_next_token_loss, seed):
    """A rank has a chunk of either half of the sequence, as context parallelism deals them."""
    batch = packed([3, 4, 1])
    positions = torch.arange(32).view(4, 8)
    chunks = [positions[[0, 3]].flatten(), positions[[1, 2]].flatten()]
    mask = loss_mask(batch, 4, EOS).long()
    counts = torch.zeros(2, *mask.shape, dtype=torch.int64)
    for own in chunks:
        index = TargetFinder(4, EOS, has_next_token_loss, own).find(batch, 8)
        counts += torch.stack(predicted(index, batch, 4))

        # indices of contexts and states count the rank's own states
        sequence = index.context_blocks // 4
        block = own[::4][index.context_blocks % 4] // 4 + 1
        real = index.valid.any(-1)
        assert torch.equal((sequence * 8 + block)[real], index.target_blocks[real])
        after = own[index.states % 16] + 1 + 32 * (index.states // 16)
        assert torch.equal(after[index.next_valid], index.next_positions[index.next_valid])

    assert torch.equal(counts[0], mask)
    assert torch.equal(counts[1], mask * has_next_token_loss)


@pytest.mark.parametrize(
    ("most", "positions", "capacity"),
    [
        (None, None, 4 * 128),  # all blocks
        (127, None, 4 * 127),  # all that can be targets
        (10, None, 64),  # 40, rounded up
        (20, None, 128),
        (20, torch.arange(64), 64),  # a rank that has no more blocks than these
    ],
)
def test_the_capacity_is_that_of_the_longest_documents(most, positions, capacity):
    finder = TargetFinder(4, EOS, False, positions, 4, most)
    assert finder.capacity(512) == capacity


def test_all_microbatches_have_one_shape(seed):
    finder = TargetFinder(4, EOS, True, micro_batch_size=2, max_targets_per_sequence=7)
    batch = finder.find_all(packed([2, 2, 4], rows=6))
    assert [tuple(part.shape) for part in batch.targets] == [
        (3, 14),
        (3, 14),
        (3, 14, 4),
        (3, 56),
        (3, 56),
        (3, 56),
    ]

    for i, microbatch in enumerate(batch.microbatches(2)):
        assert torch.equal(microbatch.tokens, batch.tokens[2 * i : 2 * i + 2])
        again = finder.find(microbatch, 14)
        assert all(torch.equal(a, b) for a, b in zip(again, microbatch.targets, strict=True))


def test_selected_sequences_have_no_targets_until_they_are_found(seed):
    batch = TargetFinder(4, EOS, True, micro_batch_size=6).find_all(packed([8], rows=6))
    assert batch.select(slice(2)).targets is None
    assert isinstance(batch.to(torch.device("cpu")).targets, TargetIndex)


@pytest.mark.parametrize(
    "words",
    [(), ("--model.block_size", "1"), ("--preset", "paper", "--sampling.guidance", "1")],
)
def test_padding_changes_neither_loss_nor_gradients(words, tiny_model, seed):
    model = tiny_model(*words, "--diffusion.context_dropout", "0.3")
    batch = packed([3, 4, 1], rows=4, block=model.block_size)
    finder = model.target_finder(batch.tokens.shape[1])
    exact = finder.find(batch)

    def loss_and_gradients(index):
        model.zero_grad()
        loss = model.loss(replace(batch, targets=index), seed=1, step=2)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = loss_and_gradients(exact)
    padded = loss_and_gradients(finder.find(batch, len(exact.valid) + 9))
    for a, b in zip(expected, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
