import math

import pytest
import torch

from bitlm_dist.model.batch import Batch, loss_mask


def batch_of(rows=8, length=32, vocabulary=300):
    tokens = torch.randint(2, vocabulary, (rows, length))
    ids = torch.tensor([0] * 12 + [1] * 16 + [-1] * 4).repeat(rows, 1)
    tokens[:, :4] = tokens[:, 12:16] = 0
    tokens[:, 10:12] = 1  # EOS and its padding
    tokens[:, 28:] = 1
    return Batch(tokens, ids, torch.arange(100, 100 + rows))


def test_targets_are_the_blocks_after_a_block_of_the_same_document():
    mask = loss_mask(batch_of(1), 4, eos=1)[0].int().tolist()

    # BOS block, tokens, tokens + EOS + padding, BOS block of document 1, its blocks, padding
    assert mask == [0] * 4 + [1] * 4 + [1, 1, 1, 0] + [0] * 4 + [1] * 12 + [0] * 4


def test_each_target_is_conditioned_on_the_block_before(tiny_model, seed):
    model = tiny_model()
    batch = batch_of(2)
    hidden = torch.arange(2 * 32.0).view(2, 32, 1).expand(2, 32, 32)
    targets = model.targets(batch, hidden)

    assert targets.block_index.tolist() == [1, 2, 4, 5, 6] * 2
    assert targets.context_hidden[:, :, 0].tolist()[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(targets.tokens[1], batch.tokens[0, 8:12])
    assert targets.sequence_index.tolist() == [100] * 5 + [101] * 5


RECIPES = [
    (),
    (
        "--diffusion.num_noise_samples",
        "3",
        "--diffusion.context_dropout",
        "0.3",
        "--diffusion.input_bit_flips",
        "0.1",
    ),
    ("--preset", "paper"),
    ("--preset", "paper", "--diffusion.loss", "v", "--diffusion.time_distribution", "logit_normal"),
    ("--preset", "paper", "--diffusion.loss", "elbo"),
    ("--diffusion.detached_losses", "[denoising, next_token]"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_is_the_same_for_any_microbatching(recipe, tiny_model, seed):
    model = tiny_model(*recipe)
    batch = batch_of()
    torch.nn.init.normal_(model.head.null_embedding)

    def gradients(rows):
        model.zero_grad()
        loss = sum(
            model.loss(batch.select(slice(i, i + rows)), seed=1, step=2) for i in range(0, 8, rows)
        )
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    for a, b in zip(gradients(8), gradients(3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_parameter_learns(tiny_model, seed):
    model = tiny_model("--diffusion.context_dropout", "0.3")
    model.loss(batch_of(), seed=1, step=2).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_untrained_paper_model_costs_one_a_token_under_eq_12(tiny):
    """With zero output and x-prediction, E[(A0 - 0)^2] = 1 exactly, per valid token."""
    from bitlm_dist.codes import BitCodes, natural_codes
    from bitlm_dist.model.build import build_model

    model = build_model(tiny("--preset", "paper"), BitCodes(natural_codes(300), 9), eos=1)
    batch = batch_of()
    valid = loss_mask(batch, 4, 1).sum()

    assert (model.loss(batch, seed=0, step=0) / valid).item() == pytest.approx(1.0)


def test_untrained_default_model_costs_at_most_ln_2_a_bit_for_each_of_its_losses(tiny_model):
    """Denoising costs less than ln 2 per bit; context, next token and chain cost ln 2 each."""
    model = tiny_model()
    batch = batch_of()

    for parameter in (
        model.head.context_out.weight,
        model.head.context_out.bias,
        model.head.final.weight,
        model.head.conditional_group_logits.rows,
    ):
        torch.nn.init.zeros_(parameter)

    loss = (model.loss(batch, seed=0, step=0) / loss_mask(batch, 4, 1).sum()).item()
    assert 3 * math.log(2) < loss < 4 * math.log(2)


def test_every_state_learns_the_token_after_it(tiny_model, seed):
    """Compare the next-token loss with a sum over tokens of the context logits at position 0."""
    base = tiny_model("--diffusion.next_token_loss_weight", "0")
    model = tiny_model("--diffusion.next_token_loss_weight", "0.5")
    model.load_state_dict(base.state_dict())
    batch = batch_of()
    hidden = model.hidden_states(batch.tokens, batch.document_ids)
    expected = 0.0

    for row in range(len(batch.tokens)):
        # no BOS blocks, and nothing after the first EOS
        for place in [*range(4, 11), *range(16, 28)]:
            # a block that repeats the last state: position 0 reads that state
            context = model.head.condition(hidden[row, place - 1].expand(1, 4, -1))
            clean = model.codes.ids_to_bits(batch.tokens[row, place].expand(1, 4))
            expected -= (
                0.5 * model.head.output.log_prob(context.context_logits, clean)[0, 0].item() / 9
            )

    got = model.loss(batch, seed=0, step=0) - base.loss(batch, seed=0, step=0)
    assert got.item() == pytest.approx(expected, rel=1e-3)


def test_noise_of_the_loss_depends_on_seed_step_and_sample_only(tiny_model, seed):
    model = tiny_model()
    batch = batch_of()
    base = model.loss(batch, seed=1, step=2)

    assert torch.equal(base, model.loss(batch, seed=1, step=2))

    moved = Batch(batch.tokens, batch.document_ids, batch.sequence_index + 1)
    for other in (
        model.loss(batch, seed=2, step=2),
        model.loss(batch, seed=1, step=3),
        model.loss(moved, seed=1, step=2),
    ):
        assert not torch.equal(base, other)

    order = torch.randperm(8)
    shuffled = Batch(batch.tokens[order], batch.document_ids[order], batch.sequence_index[order])

    torch.testing.assert_close(model.loss(shuffled, seed=1, step=2), base)
