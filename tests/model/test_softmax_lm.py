import pytest
import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.build import build_model
from bitlm_dist.model.softmax_lm import SoftmaxLM

VOCABULARY = 300


@pytest.fixture
def softmax(tiny, seed):
    def make(*overrides):
        model = build_model(
            tiny("--model.output", "softmax", *overrides),
            BitCodes(natural_codes(VOCABULARY), 9),
            eos=1,
        )
        assert isinstance(model, SoftmaxLM)
        return model

    return make


def batch_of(rows=3):
    tokens = torch.randint(2, VOCABULARY, (rows, 32))
    ids = torch.tensor([0] * 12 + [1] * 16 + [-1] * 4).repeat(rows, 1)
    tokens[:, 10:12] = 1  # EOS, and a second one that must not count
    return Batch(tokens, ids, torch.arange(rows))


def test_one_switch_makes_the_baseline(tiny):
    config = tiny("--model.output", "softmax")
    assert config.model.block_size == 1, "the file says 4"
    assert config.model.backbone == tiny().model.backbone


@pytest.mark.parametrize("tied", ["true", "false"])
def test_loss_is_the_cross_entropy_of_the_next_token_inside_a_document(softmax, tied):
    """Compare with an fp64 log-softmax, position by position."""
    model = softmax("--model.tie_embeddings", tied)
    batch = batch_of()
    hidden = model.hidden_states(batch.tokens, batch.document_ids).double()
    expected = 0.0

    for row in range(len(batch.tokens)):
        for place in range(1, 32):
            before = batch.document_ids[row, place - 1]
            if before < 0 or before != batch.document_ids[row, place]:
                continue
            logits = hidden[row, place - 1] @ model.output.rows[:VOCABULARY].double().T
            expected -= logits.log_softmax(-1)[batch.tokens[row, place]].item()

    assert model.loss(batch, seed=0, step=0).item() == pytest.approx(expected, rel=1e-5)
    assert (model.output.rows is model.embedding.rows) == (tied == "true")


def test_scores_in_slices_equal_the_loss(softmax, monkeypatch):
    from bitlm_dist.model import softmax_lm

    model = softmax()
    batch = batch_of()
    targets = model.targets(batch, model.hidden_states(batch.tokens, batch.document_ids))
    monkeypatch.setattr(softmax_lm, "MAX_LOGITS_PER_CHUNK", 7 * VOCABULARY)
    nats = model.nll(targets.context_hidden[targets.valid], targets.tokens[targets.valid])

    assert nats.sum().item() == pytest.approx(model.loss(batch, seed=0, step=0).item(), rel=1e-5)


def test_the_loss_reaches_every_parameter(softmax):
    model = softmax()
    model.loss(batch_of(), seed=0, step=0).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_follow_the_softmax(softmax):
    model = softmax()
    torch.nn.init.normal_(model.output.rows, std=0.5)
    hidden = torch.randn(1, 32)
    count = 200_000
    u = ((torch.arange(count) + 0.5) / count).view(-1, 2)

    # with equidistant u, frequencies match the probabilities up to 1/count
    drawn = (
        model.sample_tokens(hidden.expand(len(u), -1), u, 0.7)
        .flatten()
        .bincount(minlength=VOCABULARY)
    )
    expected = (hidden.double() @ model.output.rows[:VOCABULARY].double().T / 0.7).softmax(-1)[0]

    torch.testing.assert_close(drawn.double() / count, expected, rtol=0, atol=3 / count + 1e-5)
    assert model.sample_tokens(hidden, torch.zeros(1, 1), 0.0).item() == expected.argmax()


def test_an_embedding_table_can_feed_the_bits_model(tiny_model, seed):
    model = tiny_model("--model.input", "table")
    batch = Batch(
        torch.randint(2, 300, (2, 32)), torch.zeros(2, 32, dtype=torch.int64), torch.arange(2)
    )
    model.loss(batch, seed=0, step=0).backward()

    # only rows of tokens that occur get a gradient
    used = batch.tokens[:, :31].flatten().unique()  # the last token is only a target
    touched = model.embedding.weight.grad.any(-1).nonzero().flatten()

    assert torch.equal(touched, used)
