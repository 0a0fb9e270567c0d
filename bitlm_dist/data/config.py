"""Config keys of the training data, and their rules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bitlm_dist.config_section import AllowedBy, Resume, Section, Trained


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

    def problems(self) -> Iterator[str]:
        """Weights that are no fractions."""
        steps = [step for step, _ in self.weight_points]
        is_ascending = steps == sorted(set(steps))
        if not steps or not is_ascending or any(weight < 0 for _, weight in self.weight_points):
            yield (
                f"data.sources: the weight of {self.path} must be a share, "
                "or [step, share] pairs with steps that ascend"
            )


class DataConfig(Section):
    """Training data."""

    path: Annotated[Path | None, Resume.FREE, Trained.FREE] = None
    """Folder written by `bitlm prep`."""
    sequence_length: int = Field(256, ge=2)
    """Tokens per packed sequence (L); a multiple of model.block_size."""
    sources: Annotated[tuple[SourceConfig, ...], AllowedBy("data.new_mixture")] = ()
    """Folders to train on, each with its weight: a fraction, or [step, fraction] pairs.

    data.path still supplies the tokenizer, codes and validation split.
    """
    new_mixture: Annotated[bool, Resume.FREE] = False
    """Let a resumed run change data.sources, effective from its latest checkpoint."""
    packing: Literal["greedy", "best_fit"] = "greedy"
    """How documents fill sequences.

    greedy splits every document that does not fit, best_fit only those longer than a sequence.
    """
    shuffle: bool = True
    """Reshuffle the documents every epoch."""
    cache: Annotated[Path | None, Resume.FREE, Trained.FREE] = None
    """Folder for decompressed shards. null: a temporary folder, removed with the process."""
    cache_limit: Annotated[str | None, Resume.FREE, Trained.FREE] = Field(
        None, pattern=r"^[0-9]+(\.[0-9]+)?[kmgt]b$"
    )
    """Cache size limit per process, e.g. 100gb; least recently used shards are evicted.

    null: unlimited.
    """
    workers: Annotated[int, Resume.FREE, Trained.FREE] = Field(0, ge=0)
    """Processes per rank that read and pack; 0 uses a thread."""

    def problems(self) -> Iterator[str]:
        """Sources without a tokenizer, or with weights that do not add up to 1."""
        if self.sources and self.path is None:
            yield (
                "data.sources needs data.path too: "
                "the folder whose tokenizer, codes and validation split are used"
            )

        source_problems = [problem for source in self.sources for problem in source.problems()]
        yield from source_problems
        if not source_problems:
            yield from self._total_weight_problems()

    def _total_weight_problems(self) -> Iterator[str]:
        """A step at which the weights do not add up to 1."""
        if not self.sources:
            return

        # Loaded here, as commands start faster without it and `bitlm prep` sets its threads first.
        import numpy as np

        # Weights are linear between their points: a sum that is right there is right everywhere.
        points = [source.weight_points for source in self.sources]
        for step in sorted({step for schedule in points for step, _ in schedule}):
            total = sum(float(np.interp(step, *np.transpose(schedule))) for schedule in points)
            if abs(total - 1) > 1e-6:
                yield (
                    f"data.sources: the weights add up to {total:g} at step {step}: "
                    "they must add up to 1"
                )
                return


def sequence_problems(data: DataConfig, block_size: int) -> Iterator[str]:
    """Sequences that are not made of whole blocks."""
    length = data.sequence_length

    # The shortest sequence is one block of context and one to predict.
    if length % block_size or length < 2 * block_size:
        near = max(2, round(length / block_size)) * block_size
        yield (
            f"data.sequence_length = {length} must be a multiple of "
            f"model.block_size = {block_size}, at least two blocks: try {near}"
        )
