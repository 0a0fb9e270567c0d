"""Config keys of the diffusion heads, one section per kind, and their rules."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from bitlm_dist.config_section import Section, Trained


class _HeadSection(Section):
    """The keys that every head has."""

    marks = (Trained.MODEL,)

    kind: str
    """Head: the default's (bitlm), the paper's (paper), or one of experiments/ablation."""
    num_layers: int = Field(3, ge=1)
    """Number of Transformer layers."""
    hidden_size: int = Field(128, ge=1)
    """Hidden size (w)."""
    num_heads: int = Field(4, ge=1)
    """Number of attention heads; divides hidden_size."""
    num_adaln_layers: int = Field(1, ge=1)
    """Number of AdaLN modulation layers, each shared by consecutive layers; at most num_layers."""

    def problems(self) -> Iterator[str]:
        """Sizes that do not go together."""
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


class _MixtureHeadSection(_HeadSection):
    """The keys of a head whose output is a mixture of products over bit groups."""

    bits_per_group: int = Field(6, ge=1, le=12)
    """Bits per group (g) of the output distribution, a mixture of products over bit groups."""
    num_mixture_components: int = Field(8, ge=1)
    """Number of mixture components (M), each a product over the bit groups."""


class BitLMHeadConfig(_MixtureHeadSection):
    """The head of the preset `default`: the paper's with the items of docs/recipe.md."""

    kind: Literal["bitlm"] = "bitlm"
    """Head: the default's (bitlm), the paper's (paper), or one of experiments/ablation."""


class AblationHeadConfig(_MixtureHeadSection):
    """The default's head without some of its items."""

    kind: Literal["ablation"] = "ablation"
    ablation: str = ""
    """head.kind = ablation: name of a head in experiments/ablation, e.g. no_lookahead."""


class PaperHeadConfig(_HeadSection):
    """The head of the paper (section 3.3)."""

    kind: Literal["paper"] = "paper"


def _kind(value: Any) -> str:
    """The kind that a section names, or the default's."""
    is_section = isinstance(value, dict)
    return str(value.get("kind", "bitlm") if is_section else getattr(value, "kind", None))


HeadConfig = Annotated[
    Annotated[BitLMHeadConfig, Tag("bitlm")]
    | Annotated[PaperHeadConfig, Tag("paper")]
    | Annotated[AblationHeadConfig, Tag("ablation")],
    Discriminator(_kind),
]
