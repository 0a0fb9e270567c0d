"""Detect a run that diverged: non-finite losses, gradient norms or weights."""

import torch

from bitlm_dist.checkpoint import store
from bitlm_dist.errors import DivergedError
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.run_folder import RunFolder

MAX_CONSECUTIVE_NONFINITE_STEPS = 20


class DivergenceMonitor:
    """Watches loss and gradient norm over the steps of a run.

    Both are the same on every rank, so all ranks raise together.

    Args:
        folder: the run folder.

    Attributes:
        is_finite: whether loss and gradient norm of the last step were finite; after
            :meth:`check_weights`, also the weights.
        has_finite_weights: False if :meth:`check_weights` found non-finite weights.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._num_consecutive_nonfinite = 0
        self.is_finite = self.has_finite_weights = True

    def record_step(self, step: int, is_finite: bool) -> None:
        """Record whether loss and gradient norm of a step were finite.

        Raises:
            DivergedError: it was the 20th non-finite step in a row.
        """
        self.is_finite = is_finite
        self._num_consecutive_nonfinite = 0 if is_finite else self._num_consecutive_nonfinite + 1

        if self._num_consecutive_nonfinite >= MAX_CONSECUTIVE_NONFINITE_STEPS:
            raise self._diverged_error(
                f"loss or gradient norm was not finite in {MAX_CONSECUTIVE_NONFINITE_STEPS} steps "
                f"in a row, up to step {step}"
            )

    def check_weights(self, engine: Engine, layout: ParallelLayout) -> None:
        """Record whether all weights are finite. Collective.

        It waits for the device, so it is meant for the end of a run.
        """
        local_tensors = [
            part.tensor for weight in engine.model_state_dict().values() for part in weight.shards
        ]
        has_nonfinite = torch.tensor(
            int(not all(bool(part.isfinite().all()) for part in local_tensors)),
            device=mesh.device(),
        )

        # a rank sees its own shards only, but all ranks must agree
        if int(mesh.all_reduce_max(has_nonfinite) if layout.world_size > 1 else has_nonfinite):
            self.is_finite = self.has_finite_weights = False

    def raise_if_diverged(self, step: int) -> None:
        """Check that the run, which ended at ``step``, left a usable model.

        Raises:
            DivergedError: the last loss or gradient norm, or a weight, is not finite.
        """
        if not self.is_finite:
            raise self._diverged_error(
                f"at its end, step {step}, the loss, the gradient norm or a weight is not finite"
            )

    def _diverged_error(self, what: str) -> DivergedError:
        """Complete the message: the last finite loss, and the checkpoint to resume from."""
        last = self._folder.last_finite_loss()
        healthy = store.latest_healthy(self._folder.checkpoints)

        loss = (
            "no step had a finite loss"
            if last is None
            else f"the last finite loss is {last[0]:.4f}, of step {last[1]}"
        )

        advice = "no checkpoint is healthy: begin a new run with a lower learning rate"
        if healthy is not None:
            advice = (
                f"the newest healthy checkpoint is {healthy}: begin a new run with a lower "
                "learning rate, or go on from there with checkpoint.fallback = true if a device "
                "is to blame"
            )

        return DivergedError(f"run.dir = {self._folder.path}: {what}; {loss}; {advice}")
