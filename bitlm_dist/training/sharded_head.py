"""The head sharded outside Megatron, by the partitioner that ``parallel.head.engine`` selects."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pkgutil import resolve_name

from bitlm_dist.config import Config
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.build import cast_weights
from bitlm_dist.model.head_loss import HeadLoss
from bitlm_dist.model.heads.build import build_head
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.registry import HEAD_PARTITIONERS
from bitlm_dist.training.optimizer import param_group
from bitlm_dist.training.partitioners.base import HeadPartitioner


def is_head_sharded(config: Config, layout: ParallelLayout) -> bool:
    """True if a partitioner of its own shards the head."""
    # On a single rank there is nothing to shard, whatever the config says.
    can_be_sharded = config.model.output == "bits" and len(layout.head_ranks()) > 1
    return can_be_sharded and config.parallel.head.engine in HEAD_PARTITIONERS


def check_head_engine(config: Config, layout: ParallelLayout) -> None:
    """Check that the head's engine is installed in a tested version.

    Raises:
        UserError: It is not.
    """
    if is_head_sharded(config, layout):
        resolve_name(HEAD_PARTITIONERS[config.parallel.head.engine]).check_installed()


def build_sharded_head(
    config: Config, model: LanguageModel, layout: ParallelLayout
) -> HeadPartitioner:
    """Build the partitioner of the head. Collective over all ranks of the job.

    Args:
        config: A checked config.
        model: The last model chunk of this rank.
        layout: The job's parallel layout.
    """
    assert isinstance(model, BitLM)
    if not model.pipeline_stage.model_chunk.is_last:
        return HeadPartitioner(layout)

    partitioner: HeadPartitioner = resolve_name(HEAD_PARTITIONERS[config.parallel.head.engine])(
        config,
        HeadLoss(config, model.codes, model.head),
        layout,
        partial(param_group, config.optimizer),
    )
    model.head_loss = partitioner.__call__
    return partitioner


@contextmanager
def with_full_head(
    partitioner: HeadPartitioner, config: Config, model: LanguageModel
) -> Iterator[None]:
    """Context in which a model has a copy of the full head, and can be evaluated.

    Collective over the ranks of the head; a no-op on others.
    """
    weights = {n.removeprefix("head."): full for n, full in partitioner.full_state_dict().items()}
    if not weights:
        yield
        return

    assert isinstance(model, BitLM)
    sharded = model.head
    full_head = build_head(config, model.codes.num_bits).to(mesh.device())
    model.head = cast_weights(full_head, config)
    model.head.load_state_dict(weights)
    try:
        yield
    finally:
        model.head = sharded
