"""Config keys of training, and their rules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bitlm_dist.config_section import AllowedBy, Resume, Section, Trained
from bitlm_dist.model.config import DiffusionConfig, ModelConfig
from bitlm_dist.registry import OPTIMIZERS


class RunConfig(Section):
    """Location of the run."""

    marks = (Resume.FREE,)

    dir: Path = Path("runs/bitlm")
    """Run folder: config, environment, metrics, checkpoints."""


class TrainingConfig(Section):
    """The training loop."""

    steps: Annotated[int, Resume.LENGTHEN] = Field(100, ge=1)
    """Number of optimizer steps."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, data order and noise."""
    global_batch_tokens: Annotated[int, AllowedBy("checkpoint.new_global_batch")] = Field(
        4096, ge=1
    )
    """Tokens per step over all ranks; a multiple of data.sequence_length."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """dtype of weights, activations and matrix products.

    With bf16 the optimizer keeps fp32 master weights; noise, posteriors and loss stay fp32, too.
    fp8: bf16, but the backbone's matrix products in fp8 by Transformer Engine.
    """
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """GPU: fp32 matrix products in fp32 (highest), TF32 (high) or bf16 (medium), as in torch."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Fuse elementwise code of layers and head with torch.compile: norms, SwiGLU, noise, loss.

    auto compiles on a GPU.
    """
    deterministic: Annotated[bool, Resume.FREE] = False
    """GPU: use only kernels with bitwise reproducible results, which are slower.

    torch warns of an operator that has no such kernel.
    """
    check_memory: Annotated[bool, Resume.FREE] = True
    """GPU: refuse to start a run that by estimate does not fit into memory, and tell what would."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class ComponentConfig(Section):
    """Per-component optimizer overrides."""

    lr_scale: float = Field(1.0, gt=0)
    """Multiplier of this component's learning rates."""
    weight_decay: float | None = Field(None, ge=0)
    """Weight decay of this component. null: optimizer.weight_decay."""


class OptimizerConfig(Section):
    """Optimizers and learning-rate schedule."""

    matrix_optimizer: Literal[tuple(OPTIMIZERS)] = "muon"  # type: ignore[valid-type]
    """Optimizer of the matrices in backbone layers and head blocks; AdamW updates the rest."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of Muon (Nesterov)."""
    adamw_lr: float = Field(3e-3, gt=0)
    """Peak learning rate of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW betas: decay per step of the running averages of the gradient and its square."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; vectors have none."""
    sharded: Annotated[bool, Resume.FREE] = True
    """Shard optimizer state and updates over the data- and context-parallel ranks."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the joint gradient norm of backbone and head to this value; 0 disables."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning-rate decay from the end of the warm-up to training.steps."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay per step of the fp32 moving average that evaluation.use_ema reads; 0 disables."""

    backbone: ComponentConfig = ComponentConfig()
    head: ComponentConfig = ComponentConfig()
    input: ComponentConfig = ComponentConfig()


class CheckpointConfig(Section):
    """Checkpoints."""

    marks = (Resume.FREE,)

    dir: Path | None = None
    """Folder for the checkpoints on another disk; RUN/checkpoints becomes a link to it.

    null: RUN/checkpoints itself.
    """
    every_steps: int = Field(1000, ge=0)
    """Save every this many steps and at the end; 0: at the end only."""
    every_minutes: float = Field(0.0, ge=0)
    """Also save after this many minutes since the last save started; 0 disables."""
    keep: int = Field(2, ge=1)
    """Number of latest healthy checkpoints to keep.

    The latest one is kept in addition while its health is unknown or it is unhealthy.
    """
    keep_every_steps: int = Field(0, ge=0)
    """Keep healthy checkpoints forever if their step is divisible by this; 0 disables."""
    asynchronous: bool = True
    """Write checkpoints in the background; every rank first copies its shards to host memory."""
    fallback: bool = False
    """If the latest checkpoint is damaged or unhealthy, resume from the latest healthy one."""
    new_global_batch: bool = False
    """Let a resumed run change training.global_batch_tokens; data and step count carry on."""


class LoggingConfig(Section):
    """Logging in addition to metrics.jsonl."""

    marks = (Resume.FREE, Trained.FREE)

    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (extra `wandb`)."""
    wandb_name: str | None = None
    """Name of the run in W&B. null: that of the run folder."""
    wandb_group: str | None = None
    """Group of the run in W&B, e.g. of one model with several seeds. null: none."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run in W&B, e.g. [baseline, "m=4"]."""


class DistillationConfig(Section):
    """Additional targets sampled from a trained softmax."""

    teacher: Path | None = None
    """Run folder of a softmax with the same tokenizer. null: no teacher.

    Its samples become additional targets of the losses that see no noise: those of the context
    logits, the next token and the autoregressive pass.
    """
    weight: float = Field(0.5, gt=0, le=1)
    """Weight of the sampled tokens in these losses; the text's own tokens have the rest."""
    num_samples: int = Field(4, ge=1, le=64)
    """Tokens to sample per position."""


def batch_problems(training: TrainingConfig, sequence_length: int) -> Iterator[str]:
    """Batches that are not made of whole sequences."""
    batch = training.global_batch_tokens
    if batch % sequence_length:
        near = max(1, round(batch / sequence_length)) * sequence_length
        yield (
            f"training.global_batch_tokens = {batch} must be a multiple of "
            f"data.sequence_length = {sequence_length}: try {near}"
        )


def distillation_problems(
    distillation: DistillationConfig,
    diffusion: DiffusionConfig,
    model: ModelConfig,
) -> Iterator[str]:
    """A teacher without a loss that could use its tokens."""
    has_loss = diffusion.loss_weights(("context", "autoregressive", "next_token"))
    if distillation.teacher is not None and not (model.output == "bits" and has_loss):
        yield (
            f"distillation.teacher = {distillation.teacher} needs model.output = bits and a loss "
            "that sees no noise: diffusion.context_loss_weight, autoregressive_loss_weight or "
            "next_token_loss_weight"
        )
