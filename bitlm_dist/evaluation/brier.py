"""BrierLM: scores samples against the text, for models without a likelihood."""

from torch import Tensor

MAX_PREFIX_LENGTH = 4


def brier_scores(truth: Tensor, first: Tensor, second: Tensor) -> list[float]:
    """Compute Brier-n for n = 1..min(M, 4), times 100; higher is better.

    Brier-n is E[1{y1 = y} + 1{y2 = y} - 1{y1 = y2}] over the first n tokens: from two independent
    samples, an unbiased estimate of 1 minus the Brier score of the model's own distribution.

    Args:
        truth: the text, ids [N, M].
        first, second: two samples after the same context, [N, M].
    """

    def agree(a: Tensor, b: Tensor) -> Tensor:
        """Whether the first 1..n tokens all agree, [N, n]."""
        return (a == b)[:, :MAX_PREFIX_LENGTH].cummin(-1).values.double()

    scores = agree(first, truth) + agree(second, truth) - agree(first, second)
    return [100 * score for score in scores.mean(0).tolist()]
