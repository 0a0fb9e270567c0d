"""Config keys of evaluation."""

from pydantic import Field

from bitlm_dist.config_section import Resume, Section, Trained


class EvaluationConfig(Section):
    """Options of `bitlm eval`."""

    marks = (Resume.FREE, Trained.FREE)

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
