"""One run is one nested, typed, frozen document: field defaults < preset < YAML file < dotted command-line overrides.

The field defaults are the preset ``default``, the recipe that measures best; ``configs/presets/paper.yaml`` is the literal paper.
The text under a field is its help.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from bitlm_dist.errors import UserError


class Section(BaseModel):
    """A frozen part of the config that refuses unknown keys, numbers that are not finite, and booleans for numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if _holds_boolean(value) and not _takes_boolean(cls.model_fields[info.field_name].annotation):
            raise ValueError("expected another value than true or false")
        return value


def _holds_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_boolean, value)))


def _takes_boolean(kind: Any) -> bool:
    return kind is bool or any(map(_takes_boolean, get_args(kind)))


class RunConfig(Section):
    """Where the run lives."""

    dir: Path = Path("runs/bitlm")
    """Run folder: config, environment, metrics, checkpoints."""


class SourceConfig(Section):
    """One of several folders to train on."""

    path: Path
    """Folder that `bitlm prep` wrote."""
    weight: float | tuple[tuple[int, float], ...]
    """Share of the sequences; or shares by step as [step, share] pairs, linear between them."""
    max_epochs: float | None = Field(None, gt=0)
    """Read it so many times at most, then leave its share to the others; none: as often as it takes."""

    @property
    def knots(self) -> tuple[tuple[int, float], ...]:
        """The weight as (step, weight) pairs."""
        return ((0, self.weight),) if isinstance(self.weight, float) else self.weight


class DataConfig(Section):
    """What is read."""

    path: Path | None = None
    """Folder that `bitlm prep` wrote."""
    sequence_length: int = Field(256, ge=2)
    """Tokens a packed sequence (L); a multiple of model.block_size."""
    sources: tuple[SourceConfig, ...] = ()
    """Folders to train on instead of data.path alone, which still gives tokenizer, codes and the validation split."""
    new_mixture: bool = False
    """Let a run continue with other data.sources, from its latest checkpoint on."""
    packing: Literal["greedy", "best_fit"] = "greedy"
    """Documents into sequences: greedy cuts whatever does not fit, best_fit cuts only documents longer than a sequence."""
    shuffle: bool = True
    """Shuffle documents anew each epoch."""
    workers: int = Field(0, ge=0)
    """Processes of every rank that read and pack; 0: a thread."""
    cache: Path | None = None
    """Folder for decompressed shards; none: a temporary one that goes with the process."""
    cache_limit: str | None = Field(None, pattern=r"^[0-9]+(\.[0-9]+)?[kmgt]b$")
    """What the cache of each process may take, e.g. 100gb; the shards that were not read for longest go. None: no limit."""


class BackboneConfig(Section):
    """The causal Transformer, Qwen-3 style."""

    layers: int = Field(4, ge=1)
    """Transformer layers."""
    width: int = Field(128, ge=1)
    """Hidden width (d)."""
    heads: int = Field(4, ge=1)
    """Query heads."""
    kv_heads: int = Field(2, ge=1)
    """Key-value heads; divides heads."""
    head_width: int = Field(32, ge=2)
    """Width of a head."""
    ffn_width: int = Field(384, ge=1)
    """Hidden width of the SwiGLU."""
    rope_base: int = Field(1_000_000, ge=1)
    """Base of the rotary positions."""
    rope_reset: bool = False
    """Begin the rotary positions anew at each document; being relative, they mean the same without."""
    attention: str = "auto"
    """Attention back end: auto, or a name that `bitlm doctor` lists."""


class HeadConfig(Section):
    """The diffusion head."""

    layers: int = Field(3, ge=1)
    """Transformer blocks."""
    width: int = Field(128, ge=1)
    """Width (w)."""
    heads: int = Field(4, ge=1)
    """Attention heads; divides width."""
    modulations: int = Field(1, ge=1)
    """AdaLN modulation layers, each shared by a run of blocks; at most layers."""
    output: Literal["bits", "mixture"] = "mixture"
    """Output law: one number a bit (paper), or a mixture of products over groups of bits."""
    group: int = Field(6, ge=1, le=12)
    """Mixture: bits a group (g)."""
    components: int = Field(8, ge=1)
    """Mixture: number of products (M in the method)."""
    squash: Literal["tanh", "none"] = "tanh"
    """Bits: A0_hat = tanh(o/2), or o itself."""
    channel_skip: bool = True
    """Bits: add the channel's own log-odds to the output; a mixture always does."""
    context_logits: bool = True
    """Add a linear read-out of the context to the output and train it at pure noise."""
    shared_readout: bool = True
    """Output a correction to the context's states and read both with one linear map; needs context_logits."""
    group_tables: bool = True
    """Chain: let every group of a token's bits see the one before it, through a table of output rows; needs a mixture."""
    posterior_input: bool = True
    """Feed the context's own posterior at the noisy bits to the head; needs context_logits."""
    context_ahead: bool = True
    """Condition token i on state i plus a map, its own at every i, of the block's last state."""
    input_condition: bool = True
    """Add time, context and place to the head's input, not only to its modulation."""
    position_table: bool = True
    """Learned m x d table added to the context."""
    engine: Literal["deepspeed", "fsdp2", "replicated"] = "deepspeed"
    """What shards the head over the ranks of the last stage: DeepSpeed's ZeRO, torch's FSDP2, or nothing (replicated)."""
    zero_stage: int = Field(2, ge=0, le=3)
    """Split nothing (0), optimizer state (1), gradients too (2), weights too (3); FSDP2 has 2 and 3."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """DeepSpeed: keep optimizer state (stages 1 to 3), or the weights too (stage 3), in the memory of the host."""


class DiffusionConfig(Section):
    """Noise and objective."""

    loss: Literal["x", "v", "bce", "elbo"] = "bce"
    """Objective: mean squared error (x), velocity-weighted (v), cross-entropy (bce) or the bound's own weight (elbo)."""
    time: Literal["uniform", "logit_normal"] = "logit_normal"
    """Law of the noise level."""
    draws: int = Field(1, ge=1, le=16)
    """Noise draws per target; the backbone runs once for all of them."""
    per_token: float = Field(0.6, ge=0, le=1)
    """Share of training blocks in which each token has its own noise level."""
    per_token_sigma: float = Field(1.5, gt=0)
    """Sigma of that logit-normal law."""
    next_token: float = Field(1.0, ge=0)
    """Weight of a loss at every state on the token after it; needs model.attention = causal and head.context_logits."""
    chain: float = Field(1.0, ge=0)
    """Weight of a loss on each token given the clean ones before it in its block; the `sequential` sampler then samples from it."""
    context_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a block's context is replaced by the learned null state; guidance needs it."""
    input_bit_flips: float = Field(0.0, ge=0, le=0.5)
    """Largest probability of flipping an input bit in training (against exposure bias)."""


class DistillationConfig(Section):
    """Targets from a trained softmax beside the text's own."""

    teacher: Path | None = None
    """Run folder of a softmax with the same tokenizer, whose draws become targets of all that reads no noise; none: no teacher."""
    weight: float = Field(0.5, gt=0, le=1)
    """Share of the loss of context and chain that the drawn tokens have."""
    draws: int = Field(4, ge=1, le=64)
    """Tokens drawn a place."""


class ModelConfig(Section):
    """The model."""

    output: Literal["bits", "softmax"] = "bits"
    """What the model predicts: a block of bits, or (the baseline) one token by a softmax over the vocabulary."""
    tied: bool = False
    """Softmax: share the embedding table with the output layer."""
    block_size: int = Field(4, ge=1)
    """Tokens a block (m); a softmax always writes one."""
    attention: Literal["block", "causal"] = "causal"
    """What a token sees of its own block: all of it (paper), or what comes before it, so that every state can predict."""
    input: Literal["bits", "table"] = "bits"
    """How tokens enter the backbone: an MLP on their bits, or an embedding table (a softmax always has one)."""
    input_window: int = Field(8, ge=0, le=16)
    """Add a look-up of every window of so many consecutive bits to that MLP; at most the bits of a token; 0: none."""
    bits: int | None = Field(None, ge=1, le=30)
    """Bits a token (B); none: as many as the tokenizer needs."""
    codes: Literal["natural", "gray", "random", "frequency", "octave"] = "octave"
    """Assignment of codes to tokens."""
    backbone: BackboneConfig = BackboneConfig()


class ComponentConfig(Section):
    """What one part of the model has of its own."""

    lr_scale: float = Field(1.0, gt=0)
    """Its learning rates as a share of the others'."""
    weight_decay: float | None = Field(None, ge=0)
    """Its weight decay; none: optimizer.weight_decay."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """Optimizers and schedule."""

    matrices: Literal["muon", "adamw"] = "muon"
    """Optimizer of the matrices of backbone layers and head blocks; AdamW takes the rest."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of Muon (Nesterov)."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW betas: decay per step of the averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    fused: Literal["auto", "torch"] = "auto"
    """AdamW on a GPU: Transformer Engine's, else NVIDIA apex's, where one is installed (auto), or torch's."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; vectors have none."""
    sharded: bool = True
    """Spread state and work over the data-parallel ranks."""
    clip_norm: float = Field(1.0, ge=0)
    """Clip the joint gradient norm here; 0: never."""
    warmup_steps: int = Field(20, ge=0)
    """Linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay after warm-up, over training.steps."""
    final_lr: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Keep a moving average of the weights in fp32, with this decay a step; 0: none. evaluation.averaged uses it."""
    backbone: ComponentConfig = ComponentConfig()
    head: ComponentConfig = ComponentConfig()
    input: ComponentConfig = ComponentConfig()


class TrainingConfig(Section):
    """The loop."""

    steps: int = Field(100, ge=1)
    """Optimizer steps."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, data order and noise."""
    global_batch_tokens: int = Field(4096, ge=1)
    """Tokens a step, over all ranks; a multiple of data.sequence_length."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: of weights, activations and products; the optimizer keeps fp32 weights, noise, posteriors and loss are fp32 too."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile what the head does element by element (bits, noise, modulation, loss) with torch.compile; auto: on a GPU."""
    deterministic: bool = False
    """On a GPU: only kernels whose results repeat bit by bit, which are slower; torch warns of an operator that has none."""


class CheckpointConfig(Section):
    """Saving."""

    dir: Path | None = None
    """Folder on another disk for this run's checkpoints, which RUN/checkpoints then leads to; none: RUN/checkpoints itself."""
    every_steps: int = Field(1000, ge=0)
    """Save every so many steps, and at the end; 0: only at the end."""
    every_minutes: float = Field(0.0, ge=0)
    """Save when so much time has passed since the last save began, too; 0: never."""
    keep: int = Field(2, ge=1)
    """Newest healthy checkpoints to keep; one whose next step has not been taken is kept beside them."""
    keep_every_steps: int = Field(0, ge=0)
    """Keep the healthy checkpoints of steps divisible by this for ever; 0: none."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; every rank copies its share into host memory first."""
    fallback: bool = False
    """Where the newest checkpoint is damaged, go on from the newest one that is whole and was healthy."""
    new_global_batch: bool = False
    """Let a resumed run have another training.global_batch_tokens; data and steps go on from where they are."""


class EvaluationConfig(Section):
    """`bitlm eval`."""

    sequences: int = Field(0, ge=0)
    """Sequences of the validation split to read; 0: all."""
    strata: int = Field(8, ge=1)
    """Noise levels a block (head passes) of the bound."""
    averaged: bool = False
    """Read the moving average of the weights instead of the weights (also `bitlm generate`); needs a run with optimizer.ema."""
    sampled_blocks: int = Field(256, ge=0)
    """Blocks to sample twice for Brier scores and the invalid-code rate."""
    every_steps: int = Field(0, ge=0)
    """Evaluate while training, every so many steps and at the end; 0: never."""


class SamplingConfig(Section):
    """`bitlm generate`."""

    sampler: Literal["ode", "sde", "sequential"] = "sequential"
    """Sampler; sequential needs diffusion.chain or diffusion.per_token > 0, or blocks of one token."""
    steps: int = Field(8, ge=1)
    """Denoising steps (K) of ode and sde."""
    guidance: float = Field(1.0, ge=0)
    """Scale of classifier-free guidance of ode and sde; 1: none."""
    temperature: float = Field(0.8, ge=0)
    """Scale of the initial noise (ode, sde) or divisor of the logits (sequential)."""
    confidence: float | None = Field(None, gt=0)
    """ode: stop a block once all |A0_hat| reach this, e.g. 0.99; none: never."""


class ParallelConfig(Section):
    """Layout."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    sequence: bool = False
    """Split the activations between layers over the tensor ranks too."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks a pipeline rank (interleaved schedule)."""
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each of the pipeline x virtual_pipeline stages; none: the last ones carry fewer, for the head's work."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks."""
    data: int | None = Field(None, ge=1)
    """Data-parallel ranks; none: what is left of the processes."""
    microbatch: int = Field(0, ge=0)
    """Sequences a forward pass of a data-parallel rank; 0: all of its share at once, with a pipeline one."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Compute activations again for the backward pass: those of attention, or whole layers."""


class LoggingConfig(Section):
    """Metrics beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project too (extra `wandb`)."""
    wandb_name: str | None = None
    """Name of the run there; none: that of the run folder."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run there, e.g. [baseline, "m=4"]."""


class Config(Section):
    """A whole run."""

    preset: Literal["default", "paper", "bare"] = "default"
    """What the fields start from."""
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
        """Hold the rules that tie fields together.

        Raises:
            UserError: names the keys, their values and the remedy.
        """
        for problem in _problems(self):
            raise UserError(problem)
        return self


def warnings_of(c: Config) -> Iterator[str]:
    """What is allowed and most likely not meant, as one line each."""
    if c.optimizer.warmup_steps > c.training.steps:
        yield (
            f"optimizer.warmup_steps = {c.optimizer.warmup_steps} is beyond training.steps = {c.training.steps}: "
            "the learning rate never reaches its peak"
        )


def _problems(c: Config) -> Iterator[str]:
    """Every broken rule as one line."""
    backbone, head, m = c.model.backbone, c.head, c.model.block_size
    if c.data.sequence_length % m or c.data.sequence_length < 2 * m:
        near = max(2, round(c.data.sequence_length / m)) * m
        yield (
            f"data.sequence_length = {c.data.sequence_length} must be a multiple of model.block_size = {m}, "
            f"at least two blocks: try {near}"
        )
    if c.training.global_batch_tokens % c.data.sequence_length:
        near = max(1, round(c.training.global_batch_tokens / c.data.sequence_length)) * c.data.sequence_length
        yield (
            f"training.global_batch_tokens = {c.training.global_batch_tokens} must be a multiple of "
            f"data.sequence_length = {c.data.sequence_length}: try {near}"
        )
    if backbone.heads % backbone.kv_heads:
        yield f"model.backbone.kv_heads = {backbone.kv_heads} must divide model.backbone.heads = {backbone.heads}"
    if backbone.head_width % 2:
        yield f"model.backbone.head_width = {backbone.head_width} must be even for rotary positions"
    if head.width % head.heads:
        yield f"head.heads = {head.heads} must divide head.width = {head.width}"
    if head.modulations > head.layers:
        yield f"head.modulations = {head.modulations} exceeds head.layers = {head.layers}: use at most one a layer"
    if head.output == "mixture" and c.diffusion.loss != "bce":
        yield f"diffusion.loss = {c.diffusion.loss} needs head.output = bits; a mixture is trained with bce"
    for name in ("posterior_input", "shared_readout"):
        if getattr(head, name) and not head.context_logits:
            yield f"head.{name} = true needs head.context_logits = true"
    if head.group_tables and not head.shared_readout:
        yield "head.group_tables = true needs head.shared_readout = true: or set it false"
    if c.diffusion.next_token and m > 1 and c.model.output == "bits":
        if c.model.attention == "block":
            yield f"diffusion.next_token = {c.diffusion.next_token}: states that see their whole block cannot predict in it; use 0"
        if not head.context_logits:
            yield f"diffusion.next_token = {c.diffusion.next_token} needs head.context_logits = true: or use 0"
    if c.model.output == "softmax" and m != 1:
        yield f"model.block_size = {m}: model.output = softmax writes one token at a time; use 1"
    if c.diffusion.input_bit_flips and c.model.input == "table":
        yield f"diffusion.input_bit_flips = {c.diffusion.input_bit_flips} needs model.input = bits"
    if c.diffusion.loss == "bce" and head.squash != "tanh":
        yield "diffusion.loss = bce reads the output as logits: set head.squash = tanh"
    if c.sampling.guidance != 1 and c.diffusion.context_dropout == 0:
        yield f"sampling.guidance = {c.sampling.guidance} needs a trained null state: set diffusion.context_dropout, e.g. 0.1"
    if c.sampling.guidance != 1 and c.sampling.sampler == "sequential":
        yield f"sampling.guidance = {c.sampling.guidance} works with sampling.sampler = ode or sde, not with sequential"
    if c.sampling.sampler == "sequential" and m > 1 and not (c.diffusion.chain or c.diffusion.per_token):
        yield "sampling.sampler = sequential needs a head trained with diffusion.chain or diffusion.per_token > 0: use ode"
    if c.sampling.sampler == "sde" and c.sampling.steps < 2:
        yield f"sampling.steps = {c.sampling.steps}: the sde sampler needs at least 2"
    yield from _source_problems(c)
    yield from _sharding_problems(c)
    teacher, taught = c.distillation.teacher, c.model.output == "bits" and (c.head.context_logits or c.diffusion.chain)
    if teacher is not None and not taught:
        yield f"distillation.teacher = {teacher} needs model.output = bits and head.context_logits or diffusion.chain"
    yield from _layout_problems(c)


def _source_problems(c: Config) -> Iterator[str]:
    """Shares that are none, or do not add up."""
    if c.data.sources and c.data.path is None:
        yield "data.sources needs data.path too: the folder whose tokenizer, codes and validation split are used"
    shares = [source.knots for source in c.data.sources]
    for source, knots in zip(c.data.sources, shares, strict=True):
        steps = [step for step, _ in knots]
        if not knots or steps != sorted(set(steps)) or any(weight < 0 for _, weight in knots):
            yield f"data.sources: the weight of {source.path} must be a share, or [step, share] pairs with steps that ascend"
            return
    for step in sorted({step for knots in shares for step, _ in knots}):
        total = sum(interpolate(knots, step) for knots in shares)
        if abs(total - 1) > 1e-6:
            yield f"data.sources: the weights add up to {total:g} at step {step}: they must add up to 1"
            return


def interpolate(knots: Sequence[tuple[int, float]], step: int) -> float:
    """A value at a step: linear between the knots (step, value), constant before the first and after the last."""
    before = [knot for knot in knots if knot[0] <= step]
    after = [knot for knot in knots if knot[0] > step]
    if not before or not after:
        return (before[-1:] or after[:1])[0][1]
    (a, x), (b, y) = before[-1], after[0]
    return x + (y - x) * (step - a) / (b - a)


def _sharding_problems(c: Config) -> Iterator[str]:
    """What `head.engine` cannot do."""
    head, bf16 = c.head, c.training.precision == "bf16"
    if head.engine == "fsdp2" and head.zero_stage < 2:
        yield f"head.zero_stage = {head.zero_stage}: head.engine = fsdp2 has stages 2 and 3 only; or use deepspeed"
    if head.engine == "deepspeed" and head.zero_stage < 2 and bf16:
        yield (
            f"head.zero_stage = {head.zero_stage} would add up gradients of bf16 weights in bf16: "
            "use 2 or 3 with training.precision = bf16"
        )
    if head.offload != "none" and head.engine != "deepspeed":
        yield f"head.offload = {head.offload} needs head.engine = deepspeed"
    least = {"none": 0, "optimizer": 1, "all": 3}[head.offload]
    if head.zero_stage < least:
        yield f"head.offload = {head.offload} needs head.zero_stage of at least {least}, not {head.zero_stage}"


def _layout_problems(c: Config) -> Iterator[str]:
    """What no number of processes could mend."""
    p, backbone, m, length = c.parallel, c.model.backbone, c.model.block_size, c.data.sequence_length
    for key in ("heads", "kv_heads", "ffn_width"):
        size = getattr(backbone, key)
        if size % p.tensor:
            fits = ", ".join(str(t) for t in range(1, size + 1) if size % t == 0 and t <= 2 * p.tensor)
            yield f"model.backbone.{key} = {size} cannot be split over parallel.tensor = {p.tensor} ranks: use one of {fits}"
    if p.sequence and p.tensor == 1:
        yield "parallel.sequence = true splits over the tensor ranks: set parallel.tensor > 1 or leave it off"
    if c.model.tied and p.pipeline > 1:
        yield "model.tied = true needs parallel.pipeline = 1: set it false"
    if c.model.output == "softmax" and 128 % p.tensor:  # to a multiple of 128 rows they are padded
        yield f"model.output = softmax splits its tables in 1, 2, 4, … parts, not in parallel.tensor = {p.tensor}"
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        yield f"parallel.virtual_pipeline = {p.virtual_pipeline} needs parallel.pipeline > 1"
    pieces = p.tensor * p.context * m * (2 if p.context > 1 else 1)
    if length % pieces:
        near = max(1, round(length / pieces)) * pieces
        yield (
            f"data.sequence_length = {length} cannot be split into whole blocks of {m} over parallel.tensor = {p.tensor} x "
            f"parallel.context = {p.context} ranks: it must be a multiple of {pieces}, e.g. {near}"
        )
    stages, layers = p.pipeline * p.virtual_pipeline, backbone.layers
    if stages > layers:
        yield f"model.backbone.layers = {layers} is too few for parallel.pipeline x virtual_pipeline = {stages} stages"
    if p.layers_per_stage is not None:
        given = list(p.layers_per_stage)
        if len(given) != stages or sum(given) != layers or min(given, default=0) < 1:
            yield (
                f"parallel.layers_per_stage = {given} must name {stages} stages (pipeline x virtual_pipeline) of a layer or more "
                f"that add up to model.backbone.layers = {layers}"
            )
