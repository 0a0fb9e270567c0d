import pytest
import torch

from bitlm_dist.evaluation.brier import brier_scores


def test_score_is_that_of_the_distribution_the_draws_come_from(seed):
    """Brier-n = 2·(Σ q·p)^n - (Σ p²)^n for tokens with text distribution q and model p."""
    p = torch.tensor([0.6, 0.3, 0.1])
    q = torch.tensor([0.2, 0.5, 0.3])
    draw = lambda law: law.multinomial(400_000 * 2, replacement=True).view(-1, 2)  # noqa: E731
    got = brier_scores(draw(q), draw(p), draw(p))
    for n, score in enumerate(got, 1):
        expected = 2 * (p @ q) ** n - (p @ p) ** n
        assert score == pytest.approx(100 * expected.item(), abs=0.6)


def test_only_a_perfect_copy_scores_100():
    truth = torch.arange(12).view(2, 6)
    assert brier_scores(truth, truth, truth) == [100.0] * 4
    assert brier_scores(truth, truth + 1, truth + 1) == [-100.0] * 4

    broken = truth.clone()
    broken[:, 1] = -1

    assert brier_scores(truth, broken, broken) == [100.0, -100.0, -100.0, -100.0], (
        "from the first wrong token on"
    )
