"""End to end: a model must learn to copy the previous block within a minute."""

import math
import time

import pytest
import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.config_loading import load_config
from bitlm_dist.diffusion.likelihood import estimate_nelbo
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.build import build_model
from bitlm_dist.training.optimizer import Optimizer
from bitlm_dist.training.partitioners.replicated import ReplicatedPartitioner

V = 256
M = 4
BLOCKS = 8
STEPS = 150


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    block = torch.randint(2, V, (16, 1, M), generator=generator)
    tokens = block.expand(16, BLOCKS, M).flatten(1)
    return Batch(tokens, torch.zeros_like(tokens), torch.arange(16) + 16 * step)


@pytest.mark.slow
def test_copying_costs_less_than_a_tenth_of_free_bits():
    began = time.perf_counter()
    torch.manual_seed(0)
    config = load_config(None, ["--data.sequence_length", "32"]).config
    model = build_model(config, BitCodes(natural_codes(V), 8), eos=1)
    partitioner = ReplicatedPartitioner(dict(model.named_parameters()))
    optimizer = Optimizer(config.optimizer, [partitioner])

    for step in range(STEPS):
        batch = batch_of(step)
        (model.loss(batch, seed=0, step=step) / (16 * (BLOCKS - 1) * M)).backward()
        optimizer.clip_and_step(min(1.0, 2 * (1 - step / STEPS)))

    # a batch that training has not seen
    batch = batch_of(10**6)
    with torch.no_grad():
        targets = model.targets(batch, model.hidden_states(batch.tokens, batch.document_ids))
        context = model.head.condition(targets.context_hidden)
        result = estimate_nelbo(
            model.head.denoisers(context),
            model.codes.ids_to_bits(targets.tokens),
            num_noise_levels=16,
            noise_key=NoiseKey(1, targets.sequence_index, targets.block_index),
            valid=targets.valid,
        )

    nats = result.nelbo.mean().item()
    print(
        f"copy task: {nats:.3f} nats per token, {nats / (8 * math.log(2)):.3f} of B ln 2, "
        f"{time.perf_counter() - began:.0f} s"
    )

    assert nats < 0.1 * 8 * math.log(2)
