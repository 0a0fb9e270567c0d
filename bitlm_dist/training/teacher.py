"""Distillation: a trained softmax says what it would write at each place, beside what the text says."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from bitlm_dist.config import Config
from bitlm_dist.config_loading import read_run
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.errors import UserError
from bitlm_dist.model.language_model import Batch
from bitlm_dist.model.softmax_lm import SoftmaxLM
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.training.weights import load_trained


class Teacher:
    """Draws tokens from a softmax; which ones depends on (seed, step, sample, place) alone.

    Args:
        model: in evaluation mode.
        draws: R, tokens a place.
        seed: of the pupil's run.
    """

    def __init__(self, model: SoftmaxLM, draws: int, seed: int) -> None:
        self._model, self._draws, self._seed = model.requires_grad_(False), draws, seed

    @classmethod
    def of_config(cls, config: Config, tokenizer: str, layout: Layout) -> "Teacher | None":
        """The teacher that a config names.

        Args:
            config: of the pupil.
            tokenizer: fingerprint of the pupil's.
            layout: of the job.

        Raises:
            UserError: the teacher is no softmax of that tokenizer, or the layout splits the model.
        """
        run = config.distillation.teacher
        if run is None:
            return None
        if layout.model > 1:
            raise UserError(f"distillation.teacher = {run} needs the whole model in one process: use parallel.data alone")
        teacher = read_run(run)
        mesh.initialize(layout)  # before a model of one process does it for itself
        folder, model, _ = load_trained(run, teacher)
        if not isinstance(model, SoftmaxLM):
            raise UserError(f"distillation.teacher = {run} is a run of bits: name one with model.output = softmax")
        if folder.tokenizer().fingerprint != tokenizer:
            raise UserError(f"distillation.teacher = {run} was trained with another tokenizer than data.path has")
        return cls(model, config.distillation.draws, config.training.seed)

    @torch.no_grad()
    def draw(self, batch: Batch, step: int) -> Batch:
        """The batch with tokens drawn after the same text before each place; those at a sequence's first place mean nothing."""
        hidden = self._model.hidden(batch.tokens, batch.document_ids)
        places = torch.arange(hidden.shape[1], device=hidden.device)
        u = Source(self._seed, batch.sample.unsqueeze(1), places, step).uniforms(noise.TEACHER, self._draws)
        following = self._model.sample(hidden.flatten(0, 1), u.flatten(0, 1), temperature=1).view(u.shape)
        return replace(batch, drawn=F.pad(following.permute(2, 0, 1)[..., :-1], (1, 0)))
