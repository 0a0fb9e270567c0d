import pytest
import torch

from bitlm_dist.model.batch import Batch
from bitlm_dist.model.loss_terms import TERMS


@pytest.fixture
def batch(seed):
    tokens = torch.randint(2, 300, (4, 32))
    tokens[:, :4] = 0
    return Batch(tokens, torch.zeros_like(tokens), torch.arange(4))


@pytest.fixture
def gradients(tiny_model, batch):
    """Factory of the loss and its gradients by name, for the same weights and any config."""
    weights = tiny_model().state_dict()

    def make(*words):
        model = tiny_model(*words)
        model.load_state_dict(weights)
        loss = model.loss(batch, seed=1, step=2)
        loss.backward()
        named = {name: p.grad for name, p in model.named_parameters()}
        of_head = {name: grad for name, grad in named.items() if name.startswith("head.")}
        others = {name: grad for name, grad in named.items() if name not in of_head}
        return loss.detach(), of_head, others

    return make


@pytest.mark.parametrize("term", TERMS)
def test_a_detached_loss_teaches_the_head_alone(term, gradients):
    """Its gradient on the backbone is what doubling its weight would add."""
    loss, head, backbone = gradients()
    detached_loss, detached_head, detached = gradients("--diffusion.detached_losses", f"[{term}]")
    _, _, doubled = gradients(f"--diffusion.{term}_loss_weight", "2")

    torch.testing.assert_close(detached_loss, loss)
    for name in head:
        torch.testing.assert_close(detached_head[name], head[name], rtol=1e-3, atol=1e-4)
    for name, grad in backbone.items():
        of_term = doubled[name] - grad
        assert of_term.any()
        torch.testing.assert_close(grad - detached[name], of_term, rtol=1e-3, atol=1e-3)


def test_with_all_losses_detached_the_backbone_learns_nothing(gradients):
    _, head, backbone = gradients("--diffusion.detached_losses", f"[{', '.join(TERMS)}]")
    assert all(grad.any() for name, grad in head.items() if name != "head.null_embedding")
    # Without a gradient, the first of several pipeline stages would wait for one for ever.
    assert all(grad is not None and not grad.any() for grad in backbone.values())


def test_teacher_tokens_are_mixed_into_the_losses_without_noise(tiny_model, batch):
    """With a teacher that repeats the text, every loss is the same as without one."""
    from dataclasses import replace

    model = tiny_model()
    taught = replace(batch, teacher_tokens=batch.tokens.expand(3, -1, -1).contiguous())
    torch.testing.assert_close(
        model.loss(taught, seed=1, step=2), model.loss(batch, seed=1, step=2)
    )
