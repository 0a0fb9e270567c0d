import pytest
import torch

from bitlm_dist.model.batch import Batch, loss_mask
from bitlm_dist.model.loss_terms import (
    NUM_NOISE_LEVELS,
    TERMS,
    loss_term_metrics,
    noise_level_bin,
    num_packed,
    pack_terms,
    sum_by_bin,
    sum_by_position,
)


def terms_of(model, batch):
    """Loss, the packed terms, and from them sums and counts [4, m]."""
    hidden = model(batch, seed=3, step=5)
    loss, packed = model.loss_from_hidden(hidden, batch, seed=3, step=5)
    assert len(packed) == num_packed(model.block_size)
    sums, counts = packed.view(2, -1)[:, :-NUM_NOISE_LEVELS].unflatten(1, (len(TERMS), -1))
    return loss, packed, sums, counts


@pytest.fixture
def batch(seed):
    tokens = torch.randint(2, 300, (4, 32))
    tokens[:, :4] = 0
    tokens[1, 9:12] = tokens[2, 30:] = 1  # EOS and its padding
    return Batch(tokens, torch.zeros_like(tokens), torch.arange(4))


@pytest.mark.parametrize("block", [1, 4])
def test_terms_add_up_to_the_loss_with_their_weights(block, batch, tiny_model):
    weights = {"denoising": 0.5, "context": 2.0, "autoregressive": 0.25, "next_token": 3.0}
    words = [w for t, v in weights.items() for w in (f"--diffusion.{t}_loss_weight", str(v))]
    model = tiny_model("--model.block_size", str(block), *words)
    loss, packed, sums, counts = terms_of(model, batch)
    totals = sums.sum(1)
    expected = sum(weights[term] * value for term, value in zip(TERMS, totals, strict=True))
    torch.testing.assert_close(loss.detach(), expected)

    num_valid = loss_mask(batch, block, eos=1).sum()
    has_next_token = block > 1
    assert counts.sum(1).tolist() == [num_valid, num_valid, num_valid, num_valid * has_next_token]
    torch.testing.assert_close(packed.view(2, -1)[0, -NUM_NOISE_LEVELS:].sum(), totals[0])


def test_the_paper_has_one_term(batch, tiny_model):
    model = tiny_model("--preset", "paper", "--sampling.guidance", "1")
    assert loss_term_metrics(terms_of(model, batch)[1].tolist()).keys() == {
        "loss_denoising",
        "loss_denoising_by_position",
        "loss_denoising_by_noise_level",
    }


def test_terms_of_microbatches_add_up(batch, tiny_model):
    model = tiny_model("--diffusion.num_noise_samples", "2")
    whole = terms_of(model, batch)[1]
    parts = [terms_of(model, batch.select(slice(i, i + 1)))[1] for i in range(4)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-4)


def test_next_token_losses_are_by_the_position_of_the_predicted_token(batch, tiny_model):
    counts = terms_of(tiny_model(), batch)[3]
    # every valid token is the next one of a state, so the counts are those of the other terms
    assert counts[3].tolist() == counts[0].tolist()


def test_sums_are_those_of_a_loop(seed):
    loss = torch.rand(3, 5, 4)
    valid = torch.rand(5, 4) > 0.3
    bins = torch.randint(0, 8, (3, 5, 4))
    by_position = sum_by_position(loss[0], valid)
    by_bin = sum_by_bin(loss, bins, valid, 8)

    for position in range(4):
        chosen = [loss[0, n, position] for n in range(5) if valid[n, position]]
        assert by_position[1, position] == len(chosen)
        torch.testing.assert_close(by_position[0, position], torch.tensor(float(sum(chosen))))
    for number in range(8):
        chosen = [
            loss[a, n, m]
            for a, n, m in torch.cartesian_prod(*map(torch.arange, loss.shape)).tolist()
            if valid[n, m] and bins[a, n, m] == number
        ]
        assert by_bin[1, number] == len(chosen)
        torch.testing.assert_close(by_bin[0, number], torch.tensor(float(sum(chosen))))


def test_bins_of_noise_levels_cover_the_unit_interval():
    times = torch.tensor([0.0, 0.124, 0.126, 0.999, 1.0])
    assert noise_level_bin(times).tolist() == [0, 0, 1, 7, 7]


def test_metrics_are_means_and_leave_out_what_has_no_token():
    by_position = {"denoising": torch.tensor([[6.0, 1.0, 0.0], [2.0, 1.0, 0.0]])}
    by_noise_level = torch.zeros(2, NUM_NOISE_LEVELS)
    by_noise_level[:, 3] = torch.tensor([7.0, 2.0])
    packed = pack_terms(by_position, by_noise_level)

    assert loss_term_metrics(packed.tolist()) == {
        "loss_denoising": pytest.approx(7 / 3),
        "loss_denoising_by_position": [3.0, 1.0, None],
        "loss_denoising_by_noise_level": [None] * 3 + [3.5] + [None] * 4,
    }


def test_a_softmax_has_no_terms():
    assert loss_term_metrics([]) == {}


def test_a_loss_that_is_not_finite_stays_in_its_bin():
    loss = torch.tensor([1.0, torch.nan, 2.0])
    sums, counts = sum_by_bin(loss, torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool), 3)
    assert sums[::2].tolist() == [1.0, 2.0]
    assert sums[1].isnan()
    assert counts.tolist() == [1, 1, 1]
