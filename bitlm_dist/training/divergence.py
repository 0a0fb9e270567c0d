"""Whether the numbers of a run are finite, and the one line that ends it when they no longer are."""

import torch

from bitlm_dist.checkpoint import store
from bitlm_dist.errors import DivergedError
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.run_folder import RunFolder

MAX_NOT_FINITE = 20  # steps in a row


class Finiteness:
    """Follows loss and gradient norm over the steps of a run. Both are the same on every rank, so all ranks raise together.

    Args:
        folder: of the run.

    Attributes:
        now: whether the last step's loss and gradient norm were finite; after :meth:`check_weights`, the weights too.
        weights: False if :meth:`check_weights` found some that are not.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._in_a_row = 0
        self.now = self.weights = True

    def record(self, step: int, finite: bool) -> None:
        """Take note of a step.

        Raises:
            DivergedError: it was the 20th in a row that was not finite.
        """
        self.now = finite
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if self._in_a_row >= MAX_NOT_FINITE:
            raise self._error(f"loss or gradient norm was not finite in {MAX_NOT_FINITE} steps in a row, up to step {step}")

    def check_weights(self, engine: Engine, layout: Layout) -> None:
        """Take note of weights that are not finite. Collective; waits for the device, so it is for the end of a run."""
        parts = [part.tensor for weight in engine.weights().values() for part in weight.slices]
        bad = torch.tensor(int(not all(bool(part.isfinite().all()) for part in parts)), device=mesh.device())
        if int(mesh.most_of_all(bad) if layout.world > 1 else bad):
            self.now = self.weights = False

    def check_end(self, step: int) -> None:
        """Hold that the run, which ended at ``step``, left a model that is worth something.

        Raises:
            DivergedError: its last loss or gradient norm, or a weight, is not finite.
        """
        if not self.now:
            raise self._error(f"at its end, step {step}, the loss, the gradient norm or a weight is not finite")

    def _error(self, what: str) -> DivergedError:
        last, healthy = self._folder.last_finite_loss(), store.newest_healthy(self._folder.checkpoints)
        loss = "no step had a finite loss" if last is None else f"the last finite loss is {last[0]:.4f}, of step {last[1]}"
        advice = "no checkpoint is healthy: begin a new run with a lower learning rate"
        if healthy is not None:
            advice = (
                f"the newest healthy checkpoint is {healthy}: begin a new run with a lower learning rate, "
                "or go on from there with checkpoint.fallback = true if a device is to blame"
            )
        return DivergedError(f"run.dir = {self._folder.path}: {what}; {loss}; {advice}")
