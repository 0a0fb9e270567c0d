"""The config of a run: one nested, typed, frozen document.

Precedence, lowest first: field defaults, preset, YAML file, dotted command-line overrides.

The field defaults are the preset ``default``, the recipe that measures best.
``configs/presets/paper.yaml`` is the literal paper. The docstring under a field is its help text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from bitlm_dist.errors import UserError
from bitlm_dist.registry import OPTIMIZERS


class Section(BaseModel):
    """A frozen section of the config.

    It refuses unknown keys, numbers that are not finite, and booleans where a number is expected.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads true as 1, which is hardly ever what a writer of `steps: yes` meant
        assert info.field_name is not None
        if _contains_boolean(value) and not _accepts_boolean(
            cls.model_fields[info.field_name].annotation
        ):
            raise ValueError("expected another value than true or false")
        return value


def _contains_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, list | tuple) and any(map(_contains_boolean, value))
    )


def _accepts_boolean(kind: Any) -> bool:
    return kind is bool or any(map(_accepts_boolean, get_args(kind)))


class RunConfig(Section):
    """Location of the run."""

    dir: Path = Path("runs/bitlm")
    """Run folder: config, environment, metrics, checkpoints."""


class SourceConfig(Section):
    """One of several folders to train on."""

    path: Path
    """Folder written by `bitlm prep`."""
    weight: float | tuple[tuple[int, float], ...]
    """Fraction of the sequences, or [step, fraction] pairs to interpolate linearly."""
    max_epochs: float | None = Field(None, gt=0)
    """Maximum number of epochs over this source; its weight is then redistributed.

    null: unlimited.
    """

    @property
    def weight_points(self) -> tuple[tuple[int, float], ...]:
        """The weight as (step, weight) pairs."""
        return ((0, self.weight),) if isinstance(self.weight, float) else self.weight


class DataConfig(Section):
    """Training data."""

    path: Path | None = None
    """Folder written by `bitlm prep`."""
    sequence_length: int = Field(256, ge=2)
    """Tokens per packed sequence (L); a multiple of model.block_size."""
    sources: tuple[SourceConfig, ...] = ()
    """Folders to train on, each with its weight: a fraction, or [step, fraction] pairs.

    data.path still supplies the tokenizer, codes and validation split.
    """
    new_mixture: bool = False
    """Let a resumed run change data.sources, effective from its latest checkpoint."""
    packing: Literal["greedy", "best_fit"] = "greedy"
    """How documents fill sequences.

    greedy splits every document that does not fit, best_fit only those longer than a sequence.
    """
    shuffle: bool = True
    """Reshuffle the documents every epoch."""
    workers: int = Field(0, ge=0)
    """Processes per rank that read and pack; 0 uses a thread."""
    cache: Path | None = None
    """Folder for decompressed shards. null: a temporary folder, removed with the process."""
    cache_limit: str | None = Field(None, pattern=r"^[0-9]+(\.[0-9]+)?[kmgt]b$")
    """Cache size limit per process, e.g. 100gb; least recently used shards are evicted.

    null: unlimited.
    """


class BackboneConfig(Section):
    """The causal Transformer, Qwen-3 style."""

    num_layers: int = Field(4, ge=1)
    """Number of Transformer layers."""
    hidden_size: int = Field(128, ge=1)
    """Hidden size (d)."""
    num_heads: int = Field(4, ge=1)
    """Number of query heads."""
    num_kv_heads: int = Field(2, ge=1)
    """Number of key-value heads; divides num_heads."""
    head_dim: int = Field(32, ge=2)
    """Width of each attention head."""
    ffn_hidden_size: int = Field(384, ge=1)
    """Hidden size of the SwiGLU."""
    rope_theta: int = Field(1_000_000, ge=1)
    """Base of the rotary position embedding."""
    rope_reset: bool = False
    """Restart the rotary positions at every document.

    The result is the same up to rounding, as rotary positions are relative.
    """
    attention: str = "auto"
    """Attention backend: auto, or a name that `bitlm doctor` lists."""


class HeadConfig(Section):
    """The diffusion head."""

    num_layers: int = Field(3, ge=1)
    """Number of Transformer layers."""
    hidden_size: int = Field(128, ge=1)
    """Hidden size (w)."""
    num_heads: int = Field(4, ge=1)
    """Number of attention heads; divides hidden_size."""
    num_adaln_layers: int = Field(1, ge=1)
    """Number of AdaLN modulation layers, each shared by consecutive layers; at most num_layers."""
    output: Literal["bits", "mixture"] = "mixture"
    """Output distribution: one logit per bit (paper), or a mixture of products over bit groups."""
    bits_per_group: int = Field(6, ge=1, le=12)
    """mixture: bits per group (g)."""
    num_mixture_components: int = Field(8, ge=1)
    """mixture: number of components (M), each a product over the bit groups."""
    squash: Literal["tanh", "none"] = "tanh"
    """bits: activation of the output o, A0_hat = tanh(o/2) or o itself."""
    channel_skip: bool = True
    """bits: add the channel's own log-odds to the output; a mixture always does."""
    context_logits: bool = True
    """Add a linear readout of the conditioning to the output, and train it at pure noise."""
    shared_readout: bool = True
    """Predict a correction to the projected hidden states and read both with one linear map.

    Needs context_logits.
    """
    group_tables: bool = True
    """Autoregressive pass: condition every group of a token's bits on the previous one.

    The previous group selects rows of a table, whose product with the state is added to the logits.
    Needs shared_readout; has an effect only on a mixture.
    """
    posterior_input: bool = True
    """Feed the head the posterior of the bits given context logits and noisy bits.

    Needs context_logits.
    """
    context_ahead: bool = True
    """Lookahead: condition token i on state i plus a projection of the block's last state.

    Each i has a projection of its own.
    """
    input_condition: bool = True
    """Add time, conditioning and position to the head's input as well as to its modulation."""
    position_table: bool = True
    """Add a learned m x d table to the conditioning, one row per position in the block."""
    engine: Literal["deepspeed", "fsdp2", "replicated"] = "deepspeed"
    """Sharding of the head over the ranks of the last stage.

    deepspeed is DeepSpeed's ZeRO, fsdp2 is torch's FSDP2, replicated is no sharding.
    """
    zero_stage: int = Field(2, ge=0, le=3)
    """ZeRO stage: shard nothing (0), optimizer state (1), gradients too (2), weights too (3).

    FSDP2 supports 2 and 3.
    """
    offload: Literal["none", "optimizer", "all"] = "none"
    """deepspeed: keep the optimizer state, or all (weights too), in host memory.

    optimizer needs stage 1, 2 or 3; all needs stage 3.
    """


class DiffusionConfig(Section):
    """Noise and training objective."""

    loss: Literal["x", "v", "bce", "elbo"] = "bce"
    """Objective.

    Mean squared error (x), velocity-weighted error (v), cross-entropy (bce), or the weight of the
    likelihood bound (elbo).
    """
    time_distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    """Distribution of the noise level."""
    num_noise_samples: int = Field(1, ge=1, le=16)
    """Noise samples per target; the backbone runs once for all of them."""
    per_token_noise_prob: float = Field(0.6, ge=0, le=1)
    """Fraction of training blocks in which every token has its own noise level."""
    per_token_noise_sigma: float = Field(1.5, gt=0)
    """Sigma of the logit-normal distribution of per-token noise levels."""
    next_token_loss_weight: float = Field(1.0, ge=0)
    """Weight of the next-token loss, which trains every state and not only the last of a block.

    Needs model.attention = causal and head.context_logits.
    """
    autoregressive_loss_weight: float = Field(1.0, ge=0)
    """Weight of the loss of the autoregressive pass: each token given the clean ones before it.

    It trains the head for the `sequential` sampler.
    """
    context_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of replacing a block's conditioning by the learned null state.

    Classifier-free guidance needs it.
    """
    input_bit_flips: float = Field(0.0, ge=0, le=0.5)
    """Maximum probability of flipping a bit of the backbone's input in training.

    Counters exposure bias.
    """


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


class ModelConfig(Section):
    """The model."""

    output: Literal["bits", "softmax"] = "bits"
    """Prediction: a block of bits, or one token by a softmax over the vocabulary (baseline)."""
    tie_embeddings: bool = False
    """softmax: share the embedding table with the output layer."""
    block_size: int = Field(4, ge=1)
    """Tokens per block (m); always 1 for a softmax."""
    attention: Literal["block", "causal"] = "causal"
    """Tokens of its own block that a token attends to.

    block: all of them (paper). causal: only those up to itself, so that every state can predict.
    """
    input: Literal["bits", "table"] = "bits"
    """Token embedding: an MLP on the bits, or an embedding table (always, for a softmax)."""
    input_window: int = Field(8, ge=0, le=16)
    """model.input = bits: add a lookup for every window of this many consecutive bits; 0: none.

    At most the bits per token.
    """
    bits: int | None = Field(None, ge=1, le=30)
    """Bits per token (B). null: as many as the tokenizer needs."""
    codes: Literal["natural", "gray", "random", "frequency", "octave"] = "octave"
    """Assignment of codes to tokens."""
    backbone: BackboneConfig = BackboneConfig()


class ComponentConfig(Section):
    """Per-component optimizer overrides."""

    lr_scale: float = Field(1.0, gt=0)
    """Multiplier of this component's learning rates."""
    weight_decay: float | None = Field(None, ge=0)
    """Weight decay of this component. null: optimizer.weight_decay."""


Beta = Annotated[float, Field(ge=0, lt=1)]


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
    sharded: bool = True
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


class TrainingConfig(Section):
    """The training loop."""

    steps: int = Field(100, ge=1)
    """Number of optimizer steps."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, data order and noise."""
    global_batch_tokens: int = Field(4096, ge=1)
    """Tokens per step over all ranks; a multiple of data.sequence_length."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """dtype of weights, activations and matrix products.

    With bf16 the optimizer keeps fp32 master weights; noise, posteriors and loss stay fp32, too.
    """
    compile: Literal["auto", "always", "never"] = "auto"
    """Fuse the head's elementwise code with torch.compile: bits, noise, modulation, loss.

    auto compiles on a GPU.
    """
    deterministic: bool = False
    """GPU: use only kernels with bitwise reproducible results, which are slower.

    torch warns of an operator that has no such kernel.
    """


class CheckpointConfig(Section):
    """Checkpoints."""

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


class EvaluationConfig(Section):
    """Options of `bitlm eval`."""

    num_sequences: int = Field(0, ge=0)
    """Number of validation sequences to evaluate; 0: all."""
    num_noise_levels: int = Field(8, ge=1)
    """Number of noise levels per block for the likelihood bound; each is one head pass."""
    use_ema: bool = False
    """Use the moving average of the weights, in `bitlm generate` as well.

    Needs a run with optimizer.ema.
    """
    num_sampled_blocks: int = Field(256, ge=0)
    """Number of blocks to sample, twice each, for Brier scores and the invalid-code rate."""
    every_steps: int = Field(0, ge=0)
    """Evaluate during training every this many steps and at the end; 0 disables."""
    num_samples: int = Field(0, ge=0)
    """Texts to write with every evaluation during training, if any, to samples.jsonl.

    Each continues the beginning of a held-out document, as the sampling section says.
    """


class SamplingConfig(Section):
    """Options of `bitlm generate`."""

    sampler: Literal["ode", "sde", "sequential"] = "sequential"
    """Sampler.

    sequential needs blocks of one token, or a head trained with
    diffusion.autoregressive_loss_weight or diffusion.per_token_noise_prob > 0.
    """
    steps: int = Field(8, ge=1)
    """ode, sde: number of denoising steps (K)."""
    guidance: float = Field(1.0, ge=0)
    """ode, sde: scale of classifier-free guidance; 1 disables."""
    temperature: float = Field(0.8, ge=0)
    """Scale of the initial noise (ode, sde) or divisor of the logits (sequential)."""
    confidence: float | None = Field(None, gt=0)
    """ode: stop early once all |A0_hat| of a block reach this, e.g. 0.99. null: never."""


class ParallelConfig(Section):
    """Parallel layout."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    sequence: bool = False
    """Also split the activations between layers over the tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks per pipeline rank (interleaved schedule)."""
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each of the pipeline x virtual_pipeline stages.

    null: balanced so that the last stages hold fewer, to make up for the head.
    """
    context: int = Field(1, ge=1)
    """Context-parallel ranks."""
    data: int | None = Field(None, ge=1)
    """Data-parallel ranks. null: all remaining ranks."""
    micro_batch_size: int = Field(0, ge=0)
    """Sequences per forward pass of a data-parallel rank.

    0: all of its sequences at once, or one with a pipeline.
    """
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass: those of attention, or of whole layers."""


class LoggingConfig(Section):
    """Logging in addition to metrics.jsonl."""

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


class Config(Section):
    """The config of a run."""

    preset: Literal["default", "paper", "bare"] = "default"
    """Preset that supplies the defaults."""
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
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
        for problem in _problems(self):
            raise UserError(problem)
        return self


def warnings_of(c: Config) -> Iterator[str]:
    """Yield a line for each setting that is allowed but most likely a mistake."""
    if c.optimizer.warmup_steps > c.training.steps:
        yield (
            f"optimizer.warmup_steps = {c.optimizer.warmup_steps} is beyond "
            f"training.steps = {c.training.steps}: the learning rate never reaches its peak"
        )


def _problems(c: Config) -> Iterator[str]:
    """Yield a line for each violated rule."""
    yield from _batch_problems(c)
    yield from _shape_problems(c)
    yield from _objective_problems(c)
    yield from _sampling_problems(c)
    yield from _source_problems(c)
    yield from _head_sharding_problems(c)
    yield from _distillation_problems(c)
    yield from _layout_problems(c)


def _batch_problems(c: Config) -> Iterator[str]:
    """Sequences that are not made of whole blocks, batches that are not made of whole sequences."""
    length = c.data.sequence_length
    batch = c.training.global_batch_tokens
    m = c.model.block_size

    # The shortest sequence is one block of context and one to predict.
    if length % m or length < 2 * m:
        near = max(2, round(length / m)) * m
        yield (
            f"data.sequence_length = {length} must be a multiple of model.block_size = {m}, "
            f"at least two blocks: try {near}"
        )

    if batch % length:
        near = max(1, round(batch / length)) * length
        yield (
            f"training.global_batch_tokens = {batch} must be a multiple of "
            f"data.sequence_length = {length}: try {near}"
        )


def _shape_problems(c: Config) -> Iterator[str]:
    """Sizes of backbone and head that do not go together."""
    backbone = c.model.backbone
    head = c.head

    # Every key-value head serves the same number of query heads.
    if backbone.num_heads % backbone.num_kv_heads:
        yield (
            f"model.backbone.num_kv_heads = {backbone.num_kv_heads} must divide "
            f"model.backbone.num_heads = {backbone.num_heads}"
        )
    if backbone.head_dim % 2:
        yield f"model.backbone.head_dim = {backbone.head_dim} must be even for rotary positions"

    # One modulation layer may serve several blocks, but not the other way round.
    if head.hidden_size % head.num_heads:
        yield f"head.num_heads = {head.num_heads} must divide head.hidden_size = {head.hidden_size}"
    if head.num_adaln_layers > head.num_layers:
        yield (
            f"head.num_adaln_layers = {head.num_adaln_layers} exceeds "
            f"head.num_layers = {head.num_layers}: use at most one per layer"
        )


def _objective_problems(c: Config) -> Iterator[str]:
    """Losses and parts of the model that cannot be trained together."""
    head = c.head
    diffusion = c.diffusion
    m = c.model.block_size

    if head.output == "mixture" and diffusion.loss != "bce":
        yield (
            f"diffusion.loss = {diffusion.loss} needs head.output = bits; "
            "a mixture is trained with bce"
        )
    for name in ("posterior_input", "shared_readout"):
        if getattr(head, name) and not head.context_logits:
            yield f"head.{name} = true needs head.context_logits = true"
    if head.group_tables and not head.shared_readout:
        yield "head.group_tables = true needs head.shared_readout = true: or set it false"

    # With blocks of one token the context logits already are a next-token loss.
    if diffusion.next_token_loss_weight and m > 1 and c.model.output == "bits":
        key = f"diffusion.next_token_loss_weight = {diffusion.next_token_loss_weight}"
        if c.model.attention == "block":
            yield f"{key}: states that see their whole block cannot predict in it; use 0"
        if not head.context_logits:
            yield f"{key} needs head.context_logits = true: or use 0"

    if c.model.output == "softmax" and m != 1:
        yield f"model.block_size = {m}: model.output = softmax writes one token at a time; use 1"
    if diffusion.input_bit_flips and c.model.input == "table":
        yield f"diffusion.input_bit_flips = {diffusion.input_bit_flips} needs model.input = bits"
    if diffusion.loss == "bce" and head.squash != "tanh":
        yield "diffusion.loss = bce reads the output as logits: set head.squash = tanh"


def _sampling_problems(c: Config) -> Iterator[str]:
    """Samplers that the head is not trained for."""
    sampling = c.sampling
    diffusion = c.diffusion

    # Guidance extrapolates from the prediction of the null state, which only dropout trains.
    if sampling.guidance != 1 and diffusion.context_dropout == 0:
        yield (
            f"sampling.guidance = {sampling.guidance} needs a trained null state: "
            "set diffusion.context_dropout, e.g. 0.1"
        )
    if sampling.guidance != 1 and sampling.sampler == "sequential":
        yield (
            f"sampling.guidance = {sampling.guidance} works with sampling.sampler = ode or sde, "
            "not with sequential"
        )

    # This sampler denoises a token while those before it are clean. Only these objectives teach it.
    if (
        sampling.sampler == "sequential"
        and c.model.block_size > 1
        and not (diffusion.autoregressive_loss_weight or diffusion.per_token_noise_prob)
    ):
        yield (
            "sampling.sampler = sequential needs a head trained with "
            "diffusion.autoregressive_loss_weight or diffusion.per_token_noise_prob > 0: use ode"
        )
    if sampling.sampler == "sde" and sampling.steps < 2:
        yield f"sampling.steps = {sampling.steps}: the sde sampler needs at least 2"


def _source_problems(c: Config) -> Iterator[str]:
    """Weights that are not fractions or do not add up to 1."""
    if c.data.sources and c.data.path is None:
        yield (
            "data.sources needs data.path too: "
            "the folder whose tokenizer, codes and validation split are used"
        )

    shares = [source.weight_points for source in c.data.sources]
    for source, knots in zip(c.data.sources, shares, strict=True):
        steps = [step for step, _ in knots]
        if not knots or steps != sorted(set(steps)) or any(weight < 0 for _, weight in knots):
            yield (
                f"data.sources: the weight of {source.path} must be a share, "
                "or [step, share] pairs with steps that ascend"
            )
            return

    if not shares:
        return

    # Loaded here, as commands start faster without it and `bitlm prep` sets its threads first.
    import numpy as np

    # Between the knots all weights are linear, so the sum is right everywhere if it is right there.
    for step in sorted({step for knots in shares for step, _ in knots}):
        total = sum(float(np.interp(step, *np.transpose(knots))) for knots in shares)
        if abs(total - 1) > 1e-6:
            yield (
                f"data.sources: the weights add up to {total:g} at step {step}: "
                "they must add up to 1"
            )
            return


def _head_sharding_problems(c: Config) -> Iterator[str]:
    """Settings that `head.engine` does not support."""
    head = c.head
    bf16 = c.training.precision == "bf16"

    # FSDP2 always shards the gradients.
    if head.engine == "fsdp2" and head.zero_stage < 2:
        yield (
            f"head.zero_stage = {head.zero_stage}: head.engine = fsdp2 has stages 2 and 3 only; "
            "or use deepspeed"
        )
    if head.engine == "deepspeed" and head.zero_stage < 2 and bf16:
        yield (
            f"head.zero_stage = {head.zero_stage} would add up gradients of bf16 weights in bf16: "
            "use 2 or 3 with training.precision = bf16"
        )

    # Only what is sharded can be offloaded.
    if head.offload != "none" and head.engine != "deepspeed":
        yield f"head.offload = {head.offload} needs head.engine = deepspeed"
    least = {"none": 0, "optimizer": 1, "all": 3}[head.offload]
    if head.zero_stage < least:
        yield (
            f"head.offload = {head.offload} needs head.zero_stage of at least {least}, "
            f"not {head.zero_stage}"
        )


def _distillation_problems(c: Config) -> Iterator[str]:
    """A teacher without a loss that could use its tokens."""
    teacher = c.distillation.teacher
    taught = c.model.output == "bits" and (
        c.head.context_logits or c.diffusion.autoregressive_loss_weight
    )
    if teacher is not None and not taught:
        yield (
            f"distillation.teacher = {teacher} needs model.output = bits and "
            "head.context_logits or diffusion.autoregressive_loss_weight"
        )


def _layout_problems(c: Config) -> Iterator[str]:
    """Layouts that the model cannot have on any number of ranks."""
    yield from _axis_problems(c)
    yield from _sequence_split_problems(c)
    yield from _stage_problems(c)


def _axis_problems(c: Config) -> Iterator[str]:
    """Tensor and pipeline axes that the model cannot be split over."""
    p = c.parallel
    backbone = c.model.backbone

    for key in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
        size = getattr(backbone, key)
        if size % p.tensor:
            fits = ", ".join(
                str(t) for t in range(1, size + 1) if size % t == 0 and t <= 2 * p.tensor
            )
            yield (
                f"model.backbone.{key} = {size} cannot be split over "
                f"parallel.tensor = {p.tensor} ranks: use one of {fits}"
            )

    if p.sequence and p.tensor == 1:
        yield (
            "parallel.sequence = true splits over the tensor ranks: "
            "set parallel.tensor > 1 or leave it off"
        )
    if c.model.tie_embeddings and p.pipeline > 1:
        yield "model.tie_embeddings = true needs parallel.pipeline = 1: set it false"
    # The softmax's tables are padded to a multiple of 128 rows.
    if c.model.output == "softmax" and 128 % p.tensor:
        yield (
            "model.output = softmax splits its tables in 1, 2, 4, … parts, "
            f"not in parallel.tensor = {p.tensor}"
        )
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        yield f"parallel.virtual_pipeline = {p.virtual_pipeline} needs parallel.pipeline > 1"


def _sequence_split_problems(c: Config) -> Iterator[str]:
    """Sequences that cannot be split into whole blocks over the ranks."""
    p = c.parallel
    m = c.model.block_size
    length = c.data.sequence_length

    # Context parallelism deals every rank one chunk from either half, to balance causal attention.
    pieces = p.tensor * p.context * m * (2 if p.context > 1 else 1)
    if length % pieces:
        near = max(1, round(length / pieces)) * pieces
        yield (
            f"data.sequence_length = {length} cannot be split into whole blocks of {m} over "
            f"parallel.tensor = {p.tensor} x parallel.context = {p.context} ranks: "
            f"it must be a multiple of {pieces}, e.g. {near}"
        )


def _stage_problems(c: Config) -> Iterator[str]:
    """Layers that cannot be split into the pipeline's stages."""
    p = c.parallel
    layers = c.model.backbone.num_layers
    stages = p.pipeline * p.virtual_pipeline

    # Every stage holds at least one layer.
    if stages > layers:
        yield (
            f"model.backbone.num_layers = {layers} is too few for "
            f"parallel.pipeline x virtual_pipeline = {stages} stages"
        )

    if p.layers_per_stage is not None:
        given = list(p.layers_per_stage)
        if len(given) != stages or sum(given) != layers or min(given, default=0) < 1:
            yield (
                f"parallel.layers_per_stage = {given} must name {stages} stages "
                "(pipeline x virtual_pipeline) of a layer or more "
                f"that add up to model.backbone.num_layers = {layers}"
            )
