"""BrierLM: how well samples agree with the text, for models that cannot score it (method, section 7)."""

from torch import Tensor

LONGEST = 4


def brier_scores(truth: Tensor, first: Tensor, second: Tensor) -> list[float]:
    """Brier-n for n = 1..min(M, 4), times 100: E[1{y1 = y} + 1{y2 = y} - 1{y1 = y2}] over the first n tokens; higher is better.

    An unbiased estimate of 1 minus the Brier score of the model's own distribution, from two independent draws.

    Args:
        truth: the text, ids [N, M].
        first, second: two draws after the same context, [N, M].
    """

    def agree(a: Tensor, b: Tensor) -> Tensor:
        """[N, n]: whether the first 1..n tokens are all equal."""
        return (a == b)[:, :LONGEST].cummin(-1).values.double()

    scores = agree(first, truth) + agree(second, truth) - agree(first, second)
    return [100 * score for score in scores.mean(0).tolist()]
