import pytest
import torch

from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizer import Optimizer, is_inner_matrix, lr_multiplier_at
from bitlm_dist.training.partitioners.replicated import ReplicatedPartitioner


def build_optimizer(named, config):
    return Optimizer(config, [ReplicatedPartitioner(named)])


def test_muon_takes_the_inner_matrices_and_adamw_the_rest(tiny_model):
    model = tiny_model()
    muon = {n for n, p in model.named_parameters() if is_inner_matrix(n, p)}
    assert {n.split(".")[0] for n in muon} == {"backbone", "head"}
    # Four per layer (qkv, projection, two of the MLP), four per head block, and the stack of the
    # lookahead's matrices.
    assert len(muon) == 2 * 4 + 2 * 4 + 1

    optimizer = build_optimizer(dict(model.named_parameters()), OptimizerConfig())
    slots = {n.rpartition(".")[2] for n in optimizer.state_dict() if n.rpartition(".")[0] in muon}
    assert slots == {"momentum_buffer"}
    assert len(optimizer.state_dict()) == len(muon) + 3 * (
        sum(1 for _ in model.parameters()) - len(muon)
    )


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_weights_in_bf16_follow_their_fp32_copies(matrices, seed):
    """A thousand updates, each too small to change a bf16 weight, add up as in fp32."""
    config = OptimizerConfig(adamw_lr=1e-5, muon_lr=1e-5, matrix_optimizer=matrices)
    exact = {
        "backbone.layers.0.w": torch.nn.Parameter(torch.randn(16, 16).bfloat16().float().sign())
    }
    rounded = {name: torch.nn.Parameter(p.detach().bfloat16()) for name, p in exact.items()}
    grad = torch.randn(16, 16).bfloat16()
    sides = [
        (build_optimizer(named, config), next(iter(named.values()))) for named in (exact, rounded)
    ]

    for _ in range(1000):
        for optimizer, parameter in sides:
            parameter.grad = grad.to(parameter.dtype)
            optimizer.clip_and_step(1.0)

    master = sides[1][0].state_dict()["backbone.layers.0.w.master"].full
    torch.testing.assert_close(master, sides[0][1].detach(), rtol=0, atol=1e-6)
    assert torch.equal(sides[1][1], master.bfloat16())
    assert not torch.equal(master.bfloat16(), master.sign().bfloat16()), "the weights moved"


def test_norm_is_the_joint_norm_and_clipping_scales_to_it(tiny_model, seed):
    model = tiny_model()
    optimizer = build_optimizer(
        dict(model.named_parameters()), OptimizerConfig(max_grad_norm=0.5, matrix_optimizer="adamw")
    )

    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()
    norm, updated = optimizer.clip_and_step(1.0)
    assert updated
    assert norm == pytest.approx(expected, rel=1e-5)

    first = (
        torch.cat(
            [v.full.flatten() for n, v in optimizer.state_dict().items() if n.endswith("exp_avg")]
        )
        / 0.1
    )
    assert first.norm().item() == pytest.approx(0.5, rel=1e-3)


def test_a_gradient_that_is_not_finite_skips_the_update(tiny_model):
    model = tiny_model()
    optimizer = build_optimizer(dict(model.named_parameters()), OptimizerConfig())
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))

    assert not optimizer.clip_and_step(1.0)[1]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_a_skipped_update_changes_no_state(matrices, dtype, seed):
    """Moments, momentum, step counts, averages and master weights stay, bit by bit."""
    shapes = {"backbone.layers.0.w": (8, 4), "head.lookahead.weight": (3, 4, 4), "head.b": (5,)}
    named = {n: torch.nn.Parameter(torch.randn(s).to(dtype)) for n, s in shapes.items()}
    optimizer = build_optimizer(named, OptimizerConfig(ema=0.9, matrix_optimizer=matrices))

    def step(bad):
        for name, parameter in named.items():
            parameter.grad = torch.randn_like(parameter)
            if bad and name == "head.b":
                parameter.grad[2] = float("inf")
        return bool(optimizer.clip_and_step(1.0)[1])

    def everything():
        state = {n: t.full.clone() for n, t in optimizer.state_dict().items()}
        return state | {n: p.detach().clone() for n, p in named.items()}

    assert step(bad=False)
    before = everything()
    assert not step(bad=True)
    after = everything()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # A bfloat16 parameter may round a small step away; what the optimizer keeps in fp32 may not.
    assert step(bad=False)
    moved = {n: t for n, t in everything().items() if t.dtype != torch.bfloat16}
    assert moved
    assert not any(torch.equal(before[name], found) for name, found in moved.items())


def test_components_have_rules_of_their_own(tiny_model):
    """AdamW's first step is SGD-like: every element moves by its learning rate, and decays."""
    named = dict(tiny_model().named_parameters())
    head = {"lr_scale": 0.5, "weight_decay": 0.0}
    config = OptimizerConfig(
        adamw_lr=0.1,
        matrix_optimizer="adamw",
        weight_decay=0.2,
        max_grad_norm=0,
        head=head,
        input={"lr_scale": 2.0},
    )
    optimizer = build_optimizer(named, config)
    before = {n: p.detach().clone() for n, p in named.items()}

    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.clip_and_step(1.0)
    for name, parameter in named.items():
        scale, decay = {"head": (0.5, 0.0), "embedding": (2.0, 0.2), "backbone": (1.0, 0.2)}[
            name.split(".")[0]
        ]
        kept = 1 - 0.1 * scale * decay if parameter.dim() > 1 else 1
        torch.testing.assert_close(
            parameter.detach(), before[name] * kept - 0.1 * scale, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_the_fp32_weights(dtype, seed):
    named = {"head.w": torch.nn.Parameter(torch.randn(4, 4).to(dtype))}
    optimizer = build_optimizer(named, OptimizerConfig(ema=0.9, matrix_optimizer="adamw"))
    expected = named["head.w"].detach().double()
    for _ in range(5):
        named["head.w"].grad = torch.randn(4, 4).to(dtype)
        optimizer.clip_and_step(1.0)
        state = {n: part.full for n, part in optimizer.state_dict().items()}
        expected = (
            0.9 * expected + 0.1 * state.get("head.w.master", named["head.w"].detach()).double()
        )

    torch.testing.assert_close(state["head.w.ema"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1, 1, 0.8682, 0.55, 0.2318]),
    ],
)
def test_schedule(schedule, expected):
    config = OptimizerConfig(schedule=schedule, warmup_steps=2, min_lr_ratio=0.1)
    factors = [lr_multiplier_at(config, step, 6) for step in range(6)]
    assert factors == pytest.approx(expected, abs=1e-4)
