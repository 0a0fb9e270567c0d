"""The config of a run: one nested, typed, frozen document.

Precedence, lowest first: field defaults, preset, YAML file, dotted command-line overrides.

The field defaults are the preset ``default``, the recipe that measures best.
``configs/presets/paper.yaml`` is the literal paper. Each section is declared beside its owner, in
`data/config.py`, `model/config.py` and so on, with its rules. The docstring under a field is its
help text.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from bitlm_dist.config_section import Section, Trained
from bitlm_dist.data.config import DataConfig, sequence_problems
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.config import EvaluationConfig
from bitlm_dist.inference.config import SamplingConfig, sampling_problems
from bitlm_dist.model.config import DiffusionConfig, ModelConfig, Term, objective_problems
from bitlm_dist.model.heads.config import BitLMHeadConfig, HeadConfig
from bitlm_dist.parallel.config import ParallelConfig, layout_problems
from bitlm_dist.training.config import (
    CheckpointConfig,
    DistillationConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    batch_problems,
    distillation_problems,
)


class Config(Section):
    """The config of a run."""

    preset: Annotated[Literal["default", "paper"], Trained.MODEL] = "default"
    """Preset that supplies the defaults."""
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = BitLMHeadConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    parallel: ParallelConfig = ParallelConfig()
    logging: LoggingConfig = LoggingConfig()

    def check(self) -> "Config":
        """Check the rules that involve more than one field.

        Returns:
            The config itself.

        Raises:
            UserError: on the first violation, naming the keys, their values and the remedy.
        """
        for problem in self.problems():
            raise UserError(problem)
        return self

    def problems(self) -> Iterator[str]:
        """Yield a line for each violated rule."""
        yield from sequence_problems(self.data, self.model.block_size)
        yield from batch_problems(self.training, self.data.sequence_length)
        yield from self.model.backbone.problems()
        yield from self.head.problems()
        yield from objective_problems(self.diffusion, self.head, self.model)
        yield from self.model.problems()
        yield from sampling_problems(self.sampling, self.diffusion, self.model.block_size)
        yield from self.sampling.problems()
        yield from self.data.problems()
        yield from self.parallel.head.problems(self.training.precision)
        yield from distillation_problems(self.distillation, self.diffusion, self.model)
        yield from self.parallel.problems(self.optimizer.sharded)
        yield from layout_problems(self.parallel, self.model, self.data.sequence_length)


def warnings_of(c: Config) -> Iterator[str]:
    """Yield a line for each setting that is allowed but most likely a mistake."""
    if c.optimizer.warmup_steps > c.training.steps:
        yield (
            f"optimizer.warmup_steps = {c.optimizer.warmup_steps} is beyond "
            f"training.steps = {c.training.steps}: the learning rate never reaches its peak"
        )
    detached = set(c.diffusion.detached_losses)
    if c.model.output == "bits" and c.diffusion.loss_weights(get_args(Term)).keys() <= detached:
        yield "diffusion.detached_losses names all losses: the backbone learns nothing"
