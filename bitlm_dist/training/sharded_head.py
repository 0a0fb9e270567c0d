"""The head sharded outside Megatron, by the partitioner that ``head.engine`` selects."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from bitlm_dist.config import Config
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.build import cast_weights
from bitlm_dist.model.head import DiffusionHead
from bitlm_dist.model.head_loss import HeadLoss
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.registry import HEAD_PARTITIONERS, load_registered
from bitlm_dist.training.optimizer import param_group
from bitlm_dist.training.partitioners.base import AbsentHead, HeadPartitioner


def is_head_sharded(config: Config, layout: ParallelLayout) -> bool:
    """True if a partitioner of its own shards the head."""
    # On a single rank there is nothing to shard, whatever the config says.
    return (
        config.model.output == "bits"
        and config.head.engine in HEAD_PARTITIONERS
        and len(layout.head_ranks()) > 1
    )


def check_head_engine(config: Config, layout: ParallelLayout) -> None:
    """Check that the head's engine is installed in a tested version.

    Raises:
        UserError: It is not.
    """
    if is_head_sharded(config, layout):
        load_registered(HEAD_PARTITIONERS, config.head.engine).check_installed()


@contextmanager
def excluded_from_ddp(model: LanguageModel) -> Iterator[None]:
    """Context in which Megatron's DDP does not see the head's parameters."""
    parameters = model.head_parameters()

    # Megatron wraps whatever requires a gradient.
    for parameter in parameters:
        parameter.requires_grad_(False)

    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ShardedHead:
    """The head of a model whose weights a partitioner owns.

    Collective: all ranks of the job must construct one; on ranks without a head, it has no weights.

    Args:
        config: A checked config.
        model: The last model chunk of this rank.
        layout: The job's parallel layout.
    """

    def __init__(self, config: Config, model: LanguageModel, layout: ParallelLayout) -> None:
        assert isinstance(model, BitLM)
        self._config = config
        self._model = model
        self.partitioner: HeadPartitioner = AbsentHead(layout)

        if model.pipeline_stage.model_chunk.is_last:
            self.partitioner = load_registered(HEAD_PARTITIONERS, config.head.engine)(
                config,
                HeadLoss(config, model.codes, model.head),
                layout,
                partial(param_group, config.optimizer),
            )
            model.head_loss = self.partitioner.__call__

    def full_state_dict(self) -> dict[str, Tensor]:
        """The full fp32 weights by name; none on ranks without a head. Collective over the head."""
        full_weights: dict[str, Tensor] = {}
        for partition in self.partitioner.partitions:
            full_weights |= partition.full_tensors()
        return full_weights

    def model_state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's shards of the weights, in the dtype that the model computes in.

        If that is fp32, they share the partitions' memory.
        """
        return {
            name: local.to(partition.weight_dtype)
            for partition in self.partitioner.partitions
            for name, local in partition.to_sharded_tensors(partition.flat).items()
        }

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Context in which this rank's model has a copy of the full head, and can be evaluated.

        Collective over the ranks of the head; a no-op on others.
        """
        full_weights = self.full_state_dict()
        if not full_weights:
            yield
            return

        sharded = self._model.head
        full_head = cast_weights(
            DiffusionHead(self._config, self._model.codes.num_bits).to(mesh.device()), self._config
        )
        full_head.load_state_dict(
            {name.removeprefix("head."): full for name, full in full_weights.items()}
        )

        self._model.head = full_head
        try:
            yield
        finally:
            self._model.head = sharded
