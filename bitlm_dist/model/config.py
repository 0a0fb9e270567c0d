"""Config keys of the model and of its objective, and their rules."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from bitlm_dist.config_section import Resume, Section, Trained


class BackboneConfig(Section):
    """The causal Transformer, Qwen-3 style."""

    marks = (Trained.MODEL,)

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
    attention: Annotated[str, Trained.FREE] = "auto"
    """Attention backend: auto, or a name that `bitlm doctor` lists."""

    def problems(self) -> Iterator[str]:
        """Heads that do not go together."""
        # Every key-value head serves the same number of query heads.
        if self.num_heads % self.num_kv_heads:
            yield (
                f"model.backbone.num_kv_heads = {self.num_kv_heads} must divide "
                f"model.backbone.num_heads = {self.num_heads}"
            )
        if self.head_dim % 2:
            yield f"model.backbone.head_dim = {self.head_dim} must be even for rotary positions"


class ModelConfig(Section):
    """The model."""

    marks = (Trained.MODEL,)

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

    def problems(self) -> Iterator[str]:
        """A baseline with blocks."""
        if self.output == "softmax" and self.block_size != 1:
            yield (
                f"model.block_size = {self.block_size}: model.output = softmax writes one token "
                "at a time; use 1"
            )


class HeadConfig(Section):
    """The diffusion head."""

    marks = (Trained.MODEL,)

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
    engine: Annotated[
        Literal["deepspeed", "fsdp2", "replicated"], Resume.FREE, Trained.TRAINING
    ] = "deepspeed"
    """Sharding of the head over the ranks of the last stage.

    deepspeed is DeepSpeed's ZeRO, fsdp2 is torch's FSDP2, replicated is no sharding.
    """
    zero_stage: Annotated[int, Resume.FREE, Trained.TRAINING] = Field(2, ge=0, le=3)
    """ZeRO stage: shard nothing (0), optimizer state (1), gradients too (2), weights too (3).

    FSDP2 supports 2 and 3.
    """
    offload: Annotated[Literal["none", "optimizer", "all"], Resume.FREE, Trained.TRAINING] = "none"
    """deepspeed: keep the optimizer state, or all (weights too), in host memory.

    optimizer needs stage 1, 2 or 3; all needs stage 3.
    """

    def problems(self) -> Iterator[str]:
        """Sizes and parts that do not go together."""
        # One modulation layer may serve several layers, but not the other way round.
        if self.hidden_size % self.num_heads:
            yield (
                f"head.num_heads = {self.num_heads} must divide "
                f"head.hidden_size = {self.hidden_size}"
            )
        if self.num_adaln_layers > self.num_layers:
            yield (
                f"head.num_adaln_layers = {self.num_adaln_layers} exceeds "
                f"head.num_layers = {self.num_layers}: use at most one per layer"
            )

        for name in ("posterior_input", "shared_readout"):
            if getattr(self, name) and not self.context_logits:
                yield f"head.{name} = true needs head.context_logits = true"
        if self.group_tables and not self.shared_readout:
            yield "head.group_tables = true needs head.shared_readout = true: or set it false"


class DiffusionConfig(Section):
    """Noise and training objective."""

    marks = (Trained.MODEL,)

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


def objective_problems(
    diffusion: DiffusionConfig, head: HeadConfig, model: ModelConfig
) -> Iterator[str]:
    """Losses that the model cannot be trained with."""
    if head.output == "mixture" and diffusion.loss != "bce":
        yield (
            f"diffusion.loss = {diffusion.loss} needs head.output = bits; "
            "a mixture is trained with bce"
        )

    # With blocks of one token the context logits already are a next-token loss.
    if diffusion.next_token_loss_weight and model.block_size > 1 and model.output == "bits":
        key = f"diffusion.next_token_loss_weight = {diffusion.next_token_loss_weight}"
        if model.attention == "block":
            yield f"{key}: states that see their whole block cannot predict in it; use 0"
        if not head.context_logits:
            yield f"{key} needs head.context_logits = true: or use 0"

    if diffusion.input_bit_flips and model.input == "table":
        yield f"diffusion.input_bit_flips = {diffusion.input_bit_flips} needs model.input = bits"
    if diffusion.loss == "bce" and head.squash != "tanh":
        yield "diffusion.loss = bce reads the output as logits: set head.squash = tanh"
