"""Config keys of the model and of its objective, and their rules."""

from collections.abc import Collection, Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from bitlm_dist.config_section import Section, Trained
from bitlm_dist.model.heads.config import HeadConfig

Term = Literal["denoising", "context", "autoregressive", "next_token"]  # of the loss


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


class DiffusionConfig(Section):
    """Noise and training objective."""

    marks = (Trained.MODEL,)

    loss: Literal["x", "v", "bce", "elbo"] = "bce"
    """Denoising loss: bce is the cross-entropy of the clean bits, with every head but the paper's.

    head.kind = paper: mean squared error (x), the velocity's error (v), or the weight of the
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
    denoising_loss_weight: float = Field(1.0, gt=0)
    """Weight of the denoising loss, the only one of head.kind = paper."""
    context_loss_weight: float = Field(1.0, ge=0)
    """Weight of the loss of the context logits, which predict the block from its context alone."""
    autoregressive_loss_weight: float = Field(1.0, ge=0)
    """Weight of the loss of the autoregressive pass: each token given the clean ones before it.

    It trains the head for the `sequential` sampler.
    """
    next_token_loss_weight: float = Field(1.0, ge=0)
    """Weight of the next-token loss, which trains every state and not only the last of a block.

    Needs model.attention = causal.
    """
    detached_losses: tuple[Term, ...] = ()
    """Losses that teach the head alone: their gradients stop at the backbone's hidden states."""
    context_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of replacing a block's conditioning by the learned null state.

    Classifier-free guidance needs it.
    """
    input_bit_flips: float = Field(0.0, ge=0, le=0.5)
    """Maximum probability of flipping a bit of the backbone's input in training.

    Counters exposure bias.
    """

    def loss_weights(self, terms: Collection[str]) -> dict[str, float]:
        """The weights of the losses in ``terms`` that are trained."""
        weights = {term: getattr(self, f"{term}_loss_weight") for term in get_args(Term)}
        return {term: weight for term, weight in weights.items() if weight and term in terms}


def objective_problems(
    diffusion: DiffusionConfig, head: HeadConfig, model: ModelConfig
) -> Iterator[str]:
    """Losses that the model cannot be trained with."""
    if model.output == "bits":
        yield from _term_problems(diffusion, head.kind, model)

    if (diffusion.loss == "bce") == (head.kind == "paper"):
        losses = "x, v or elbo" if head.kind == "paper" else "bce"
        yield f"diffusion.loss = {diffusion.loss}: head.kind = {head.kind} is trained with {losses}"
    if diffusion.input_bit_flips and model.input == "table":
        yield f"diffusion.input_bit_flips = {diffusion.input_bit_flips} needs model.input = bits"


def _term_problems(diffusion: DiffusionConfig, kind: str, model: ModelConfig) -> Iterator[str]:
    """Weights of losses that the model does not have."""
    if kind == "paper":
        for term in diffusion.loss_weights({"context", "autoregressive", "next_token"}):
            key = f"diffusion.{term}_loss_weight"
            yield (
                f"{key} = {getattr(diffusion, f'{term}_loss_weight')}: head.kind = paper has no "
                "such loss: use 0, as preset: paper does"
            )

    # With blocks of one token the context logits already are a next-token loss.
    weight = diffusion.next_token_loss_weight
    if weight and model.block_size > 1 and model.attention == "block":
        yield (
            f"diffusion.next_token_loss_weight = {weight}: states that see their whole block "
            "cannot predict in it; use 0"
        )
    if kind == "bitlm" and not diffusion.autoregressive_loss_weight:
        yield (
            "diffusion.autoregressive_loss_weight = 0 leaves a part of the head untrained: "
            "use head.kind = ablation with head.ablation = no_autoregressive_pass"
        )
