"""The wiring, end to end: a model whose next block is this block must learn it within a minute."""

import math
import time

import pytest
import torch

from bitlm_dist.codes import BitCodes, natural
from bitlm_dist.config_loading import load
from bitlm_dist.diffusion.likelihood import bound
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.language_model import Batch
from bitlm_dist.training.optimizer import Optimizers

V, M, BLOCKS, STEPS = 256, 4, 8, 150


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    block = torch.randint(2, V, (16, 1, M), generator=generator)
    tokens = block.expand(16, BLOCKS, M).flatten(1)
    return Batch(tokens, torch.zeros_like(tokens), torch.arange(16) + 16 * step)


@pytest.mark.slow
def test_copying_costs_less_than_a_tenth_of_free_bits():
    began = time.perf_counter()
    torch.manual_seed(0)
    config = load(None, ["--data.sequence_length", "32"]).config
    model = BitLM(config, BitCodes(natural(V), 8), eos=1)
    optimizers = Optimizers(dict(model.named_parameters()), config.optimizer)
    for step in range(STEPS):
        batch = batch_of(step)
        (model.loss(batch, seed=0, step=step) / (16 * (BLOCKS - 1) * M)).backward()
        optimizers.step(min(1.0, 2 * (1 - step / STEPS)))
    batch = batch_of(10**6)
    with torch.no_grad():
        targets = model.targets(batch, model.hidden(batch.tokens, batch.document_ids))
        context = model.head.read(targets.context)
        result = bound(
            model.head.denoisers(context),
            model.codes.encode(targets.tokens),
            strata=16,
            source=Source(1, targets.sample, targets.block),
            valid=targets.valid,
        )
    nats = result.nats.mean().item()
    print(f"copy task: {nats:.3f} nats a token, {nats / (8 * math.log(2)):.3f} of B ln 2, {time.perf_counter() - began:.0f} s")
    assert nats < 0.1 * 8 * math.log(2)
