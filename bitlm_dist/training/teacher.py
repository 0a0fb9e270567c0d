"""Distillation: a trained softmax model samples alternatives to the text's tokens."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from bitlm_dist.config import Config
from bitlm_dist.config_loading import load_run_config
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.errors import UserError
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.softmax_lm import SoftmaxLM
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.weights import load_trained_model


class Teacher:
    """Samples tokens from a softmax model, as a function of (seed, step, sequence, position) alone.

    Args:
        model: The teacher, in eval mode.
        num_samples: R, samples per position.
        seed: Seed of the student's run.
    """

    def __init__(self, model: SoftmaxLM, num_samples: int, seed: int) -> None:
        self._model = model.requires_grad_(False)
        self._num_samples = num_samples
        self._seed = seed

    @classmethod
    def from_config(
        cls, config: Config, tokenizer_fingerprint: str, layout: ParallelLayout
    ) -> "Teacher | None":
        """Load the teacher that a config names; None if it names none.

        Args:
            config: The student's config.
            tokenizer_fingerprint: Fingerprint of the student's tokenizer.
            layout: The job's parallel layout.

        Raises:
            UserError: The teacher is not a softmax model with the same tokenizer, or the layout
                splits the model.
        """
        run = config.distillation.teacher
        if run is None:
            return None
        if layout.model_parallel_size > 1:
            raise UserError(
                f"distillation.teacher = {run} needs the whole model in one process: "
                "use parallel.data alone"
            )

        teacher_config = load_run_config(run)
        # Loading a model would otherwise initialise the groups for a job of one process.
        mesh.init_process_groups(layout)
        folder, model, _ = load_trained_model(run, teacher_config)

        if not isinstance(model, SoftmaxLM):
            raise UserError(
                f"distillation.teacher = {run} was trained with model.output = bits: "
                "name a run with model.output = softmax"
            )
        if folder.tokenizer().fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"distillation.teacher = {run} was trained with another tokenizer "
                "than data.path has"
            )
        return cls(model, config.distillation.num_samples, config.training.seed)

    @torch.no_grad()
    def annotate(self, batch: Batch, step: int) -> Batch:
        """Add the teacher's samples for each position, given the text before it, to a batch.

        Args:
            batch: The text; B sequences of S tokens.
            step: Index of the training step; part of the key of the random numbers.

        Returns:
            The batch with ``teacher_tokens`` [R, B, S]. Those at position 0, which has no text
            before it, are padding.
        """
        hidden = self._model.hidden_states(batch.tokens, batch.document_ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device)

        u = NoiseKey(self._seed, batch.sequence_index.unsqueeze(1), positions, step).uniform(
            noise.TEACHER_STREAM, self._num_samples
        )
        next_tokens = self._model.sample_tokens(
            hidden.flatten(0, 1), u.flatten(0, 1), temperature=1
        ).view(u.shape)

        # The sample of position i predicts the token at i + 1.
        return replace(batch, teacher_tokens=F.pad(next_tokens.permute(2, 0, 1)[..., :-1], (1, 0)))
