"""The head as a part of the model that something else than Megatron shards: `head.engine` says what."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from bitlm_dist.config import Config
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.build import rounded
from bitlm_dist.model.head import DiffusionHead
from bitlm_dist.model.head_loss import HeadLoss
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.parallel.partition import Partition
from bitlm_dist.parallel.sliced import Sliced
from bitlm_dist.parallel.zero_head import ZeroHead, check_deepspeed
from bitlm_dist.training.head_optimizer import HeadOptimizer
from bitlm_dist.training.optimizer import AVERAGE, MASTER, Averages, groups_of

STEP = "step"  # of AdamW's state, one number a partition


class HeadEngine(Protocol):
    """What shards the head: a module over the ranks of the last stage, whose gradients it adds up."""

    def __call__(self, context: Tensor, states: Tensor, *rest: Any) -> Tensor:
        """:meth:`HeadLoss.forward` of this rank's blocks; the gradient by context and states is theirs, unscaled."""
        ...

    def begin(self, last: bool) -> None:
        """The next forward and backward are of a microbatch, the step's last or not."""
        ...

    def reduce(self) -> None:
        """After the last backward: whatever of the gradients' sum the backward left undone."""
        ...

    def norm(self) -> float:
        """Of the whole gradient."""
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer update the partitions, bring the weights after them and forget the gradients."""
        ...

    def partitions(self) -> list[Partition]:
        """The fp32 weights as the optimizer sees them."""
        ...

    def publish(self) -> None:
        """The fp32 partitions were changed from outside: bring the weights that the module computes with after them."""
        ...


def is_sharded(config: Config, layout: Layout) -> bool:
    """Whether an engine of its own takes the head: on one rank there is nothing to shard."""
    return config.model.output == "bits" and config.head.engine != "replicated" and len(layout.head_ranks()) > 1


def check_engine(config: Config, layout: Layout) -> None:
    """Raise :class:`~bitlm_dist.errors.UserError` where the engine that will take the head is not there in a tested version."""
    if is_sharded(config, layout) and config.head.engine == "deepspeed":
        check_deepspeed()


@contextmanager
def held_back(model: LanguageModel) -> Iterator[None]:
    """While open, Megatron's data parallelism and optimizers do not see the head's parameters."""
    parameters = list(model.head.parameters()) if isinstance(model, BitLM) and model.place.stage.predicts else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ShardedHead:
    """One of the parts of a step (:class:`~bitlm_dist.training.optimizer.Part`), and of a checkpoint; every process makes one.

    On ranks of other stages it does nothing but learn the norm.

    Args:
        config: checked.
        model: the last chunk of this process.
        layout: of the job.
    """

    def __init__(self, config: Config, model: LanguageModel, layout: Layout) -> None:
        assert isinstance(model, BitLM)
        self._layout = layout
        self._updated = False  # in this step
        self.engine: HeadEngine | None = None
        if not model.place.stage.predicts:
            return
        module = HeadLoss(config, model.codes, model.head)
        self._dtype = next(model.head.parameters()).dtype
        named: dict[str, Tensor] = dict(module.named_parameters())
        if config.head.engine == "fsdp2":
            from bitlm_dist.parallel.fsdp_head import FsdpHead  # brings half a second of torch

            self.engine = FsdpHead(config, module, list(model.head.blocks))
            named = {partition.pieces[0].name: partition.flat for partition in self.engine.partitions()}
            self._optimizer = HeadOptimizer(groups_of(named, config.optimizer), config.optimizer)
        else:
            self._optimizer = HeadOptimizer(groups_of(named, config.optimizer), config.optimizer)
            self.engine = ZeroHead(config, module, self._optimizer)
        self._optimizer.partitions = self.engine.partitions
        self._averages = Averages(config.optimizer.ema, self._flats())
        self._config, self._model = config, model
        model.head_loss = self.engine.__call__

    def _flats(self) -> dict[str, Tensor]:
        """The partitions, each by the name of its first tensor."""
        assert self.engine is not None
        return {partition.pieces[0].name: partition.flat for partition in self.engine.partitions()}

    def begin(self, last: bool) -> None:
        """See :class:`HeadEngine`."""
        if self.engine is not None:
            self.engine.begin(last)

    def squares(self) -> float:
        """See :class:`~bitlm_dist.training.optimizer.Part`."""
        found = torch.zeros((), dtype=torch.float64, device=mesh.device())
        if self.engine is not None:
            self.engine.reduce()
            norm = self.engine.norm()  # every rank of the head calls it, one tensor rank counts it
            if self._layout.tensor_rank == 0:
                found += norm**2
        return float(mesh.sum_over_model(found, self._layout))

    def update(self, scale: float, factor: float) -> None:
        """See :class:`~bitlm_dist.training.optimizer.Part`."""
        if self.engine is not None:
            self._optimizer.prepare(scale, factor)
            self.engine.step(self._optimizer)
            self._averages.follow(self._flats())
            self._updated = True

    def clear(self) -> None:
        """See :class:`~bitlm_dist.training.optimizer.Part`. An engine forgets in its step: a skipped one is one without effect."""
        if self.engine is not None and not self._updated:
            self._optimizer.prepare(1.0, 0.0, skip=True)
            self.engine.step(self._optimizer)
        self._updated = False

    def _parts(self) -> Iterator[tuple[Partition, dict[str, Tensor]]]:
        """Every partition with its state and average."""
        if self.engine is None:
            return
        groups = {name: group for group in self._optimizer.param_groups for name in group["names"]}
        for partition in self.engine.partitions():
            name = partition.pieces[0].name
            slots = dict(self._optimizer.slots(partition.flat, groups[name]))
            if name in self._averages.by_name:
                slots[AVERAGE] = self._averages.by_name[name]
            yield partition, slots

    def consolidated(self) -> dict[str, Tensor]:
        """The whole fp32 weights by name; every rank of the head calls it, on others there are none."""
        found: dict[str, Tensor] = {}
        for partition in [] if self.engine is None else self.engine.partitions():
            table = partition.table(partition.flat)
            found |= {piece.name: piece.read(table) for piece in partition.pieces}
        return found

    def weights(self) -> dict[str, Sliced]:
        """What this rank holds of the weights, in the precision that the model computes in; in fp32 the partitions themselves."""
        pieces = ((p, piece) for p, _ in self._parts() for piece in p.pieces)
        return {piece.name: p.sliced(piece, p.flat).to(self._dtype) for p, piece in pieces}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While open, the model of this rank has the whole head, a copy, and can be evaluated; every rank of the head calls it."""
        if self.engine is None:
            yield
            return
        sharded = self._model.head
        copy = rounded(DiffusionHead(self._config, self._model.codes.bits).to(mesh.device()), self._config)
        copy.load_state_dict({name.removeprefix("head."): whole.to(self._dtype) for name, whole in self.consolidated().items()})
        self._model.head = copy
        try:
            yield
        finally:
            self._model.head = sharded

    def state(self) -> dict[str, Sliced]:
        """``NAME.SLOT`` as :meth:`Optimizers.state` has them: what this rank's partitions hold."""
        found: dict[str, Sliced] = {}
        for partition, slots in self._parts():
            masters = {MASTER: partition.flat} if self._dtype != torch.float32 else {}
            for slot, value in {**slots, **masters}.items():
                for piece in partition.pieces:
                    sliced = Sliced.whole(value) if slot == STEP else partition.sliced(piece, value)
                    found[f"{piece.name}.{slot}"] = sliced
        return found

    def restore(self) -> None:
        """Take over what was loaded into the slices of :meth:`weights` and :meth:`state`."""
        if self.engine is not None:
            self.engine.publish()
