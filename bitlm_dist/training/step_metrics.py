"""The metrics of a step: a line of metrics.jsonl."""

from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.data.mixture_dataset import MixtureDataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.model.loss_terms import loss_term_metrics
from bitlm_dist.parallel import mesh
from bitlm_dist.training.optimizer import learning_rates
from bitlm_dist.training.resource_usage import memory_usage
from bitlm_dist.training.step_pipeline import StepReport
from bitlm_dist.training.train_state import TrainState


def step_metrics(
    config: Config,
    report: StepReport,
    state: TrainState,
    dataset: PackedDataset | MixtureDataset,
    num_evaluation_failures: int,
    has_finite_weights: bool,
) -> dict[str, Any]:
    """What a step reports, with times, learning rates, memory and the position in the data.

    Args:
        config: the run's config.
        report: the step's report.
        state: the state of the run after the step.
        dataset: the training data.
        num_evaluation_failures: failed evaluations of the run.
        has_finite_weights: whether all weights were finite when they were last checked.

    Returns:
        The values by their keys in metrics.jsonl, which docs/run-folder.md lists.

    Raises:
        RuntimeError: what was recorded has the name of another value.
    """
    predicted, _ = report.values["num_tokens_and_bytes"]
    metrics: dict[str, Any] = {
        **state.progress(),
        "time": report.completed.time,
        "sequences": state.next_sequence,
        "loss": report.loss,
        **loss_term_metrics(report.values["loss_terms"]),
        "grad_norm": report.grad_norm,
        "tokens_per_second": config.training.global_batch_tokens / report.seconds,
        "predicted_tokens_per_second": predicted / report.seconds,
        "data_wait_seconds": report.data_wait_seconds,
        **learning_rates(config.optimizer, report.lr_multiplier),
        **memory_usage(mesh.device()),
        "lr_factor": report.lr_multiplier,
        "skipped": int(not report.values["applied"][0]),
        "evaluation_failures": num_evaluation_failures,
        "weights_finite": has_finite_weights,
        **dataset.sequences_per_source(state.step),
        **dataset.epochs(state.step, state.next_sequence),
    }
    if taken := sorted(metrics.keys() & report.recorded.keys()):
        raise RuntimeError(f"record({taken[0]!r}): metrics.jsonl has another value of this name")
    return {**metrics, **report.recorded}
