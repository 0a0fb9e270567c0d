"""Initial weights depend on the seed and the name of the tensor alone."""

import math

import pytest
import torch
from goodness_of_fit import kolmogorov_smirnov
from torch import nn

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.model import initialization
from bitlm_dist.model.build import build_model
from bitlm_dist.model.initialization import draw_weights, normal, random_parameter, shard, unshard

CODES = BitCodes(natural_codes(300), 9)
SOFTMAX = (
    *("--model.output", "softmax", "--model.block_size", "1"),
    *("--diffusion.next_token_loss_weight", "0"),
)
MODELS = {
    "default": (),
    "one token": ("--model.block_size", "1"),
    "windows": ("--model.input_window", "4"),
    "table": ("--model.input", "table"),
    "paper": ("--preset", "paper"),
    "softmax": SOFTMAX,
    "tied": (*SOFTMAX, "--model.tie_embeddings", "true"),
}


def parameters(config):
    return dict(build_model(config, CODES, eos=1).named_parameters())


def test_weights_do_not_depend_on_what_was_drawn_before_and_disturb_nothing(tiny, seed):
    config = tiny("--training.seed", str(seed))
    first = parameters(config)
    torch.rand(7)
    state = torch.get_rng_state()
    second = parameters(config)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_seeds_and_other_layers_draw_other_weights(tiny, seed):
    one, other = (parameters(tiny("--training.seed", str(s))) for s in (seed, seed + 1))
    matrices = [name for name, tensor in one.items() if tensor.dim() >= 2 and tensor.any()]

    assert len(matrices) > 10
    assert not any(torch.equal(one[name], other[name]) for name in matrices)

    layers = [one[name] for name in matrices if name.endswith("linear_fc2.weight")]
    assert len(layers) == 2
    assert not torch.equal(*layers)


def test_tensors_of_other_names_and_seeds_are_uncorrelated(seed):
    module = nn.ParameterDict(
        {name: random_parameter(512, 512, distribution=normal(1.0)) for name in ("one", "other")}
    )
    drawn = []
    for number in (seed, seed + 1):
        draw_weights(module, number)
        drawn += [parameter.detach().double().flatten() for parameter in module.values()]

    correlations = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / 512


def test_standard_deviations(tiny):
    config = tiny("--model.backbone.hidden_size", "64", "--model.backbone.ffn_hidden_size", "256")
    for name, tensor in build_model(config, CODES, eos=1).backbone.named_parameters():
        if tensor.dim() < 2:
            assert bool((tensor == 1).all()), name
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.02 / math.sqrt(2 * config.model.backbone.num_layers) if residual else 0.02
        assert float(tensor.detach().std()) == pytest.approx(
            expected, rel=5 / math.sqrt(2 * tensor.numel())
        ), name


def expected_distribution(name, parameters):
    """The distribution function of a parameter that is neither constant nor a backbone matrix."""
    if name.endswith((".rows", ".table", "embedding.weight")):
        std = 0.02
    elif name.endswith("position_bias"):
        std = 0.1
    else:
        # torch's for a linear map; a bias has the bound of its weight
        weight = parameters[name.removesuffix("bias").removesuffix("weight") + "weight"]
        bound = 1 / math.sqrt(weight.shape[1])
        return lambda x: ((x + bound) / (2 * bound)).clamp(0, 1)
    return lambda x: torch.special.ndtr(x / std)


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_distributions_outside_the_backbone(overrides, tiny, seed):
    found = parameters(tiny("--training.seed", str(seed), *overrides))
    drawn = {n: p for n, p in found.items() if not n.startswith("backbone.") and p.any()}
    assert drawn
    for name, parameter in drawn.items():
        distance = kolmogorov_smirnov(parameter.detach(), expected_distribution(name, found))
        assert distance < 2.7, name


@pytest.fixture
def unset_memory_is_nan():
    """What torch does with memory that nobody has written, if it has to be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_every_parameter_is_set(overrides, precision, tiny, unset_memory_is_nan):
    config = tiny("--training.precision", precision, *overrides)
    unset, drawn = (build_model(config, CODES, eos=1, initialize=flag) for flag in (False, True))

    assert all(p.isfinite().all() for p in drawn.parameters())
    assert all(b.isfinite().all() for b in drawn.buffers())
    # the test would notice: all but constants is unset without drawing
    constants = {n for n, p in unset.named_parameters() if p.isfinite().all()}
    assert constants == {n for n, p in drawn.named_parameters() if not p.any() or (p == 1).all()}


class Layer(nn.Module):
    """Parts of the weights of one layer and of a table, named as in a full model."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, random_parameter(*shape, distribution=normal(0.5)))


def full_shapes(layer, width):
    prefix = f"backbone.block.layers.{layer}."
    return {
        f"{prefix}self_attention.linear_qkv.weight": (24, width),
        f"{prefix}self_attention.linear_proj.weight": (5, 3 * width),
        f"{prefix}mlp.linear_fc1.weight": (32, width),
        f"{prefix}mlp.linear_fc2.weight": (7, 8 * width),
        "embedding.rows": (16, width),
        "head.stack": (3, 4, width),
        "head.bias": (width,),
    }


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("numel", [8, 100, 2**17])
def test_shards_are_those_of_the_full_tensors(num_ranks, numel, seed, monkeypatch):
    """On all layouts and in chunks of any size, also where a rank has an odd number of columns."""
    shapes = full_shapes(5, 8 * 3)
    shapes = {n: s for n, s in shapes.items() if "proj" not in n} | {
        n: (s[0], 5 * num_ranks) for n, s in shapes.items() if "proj" in n
    }
    full = Layer(shapes)
    draw_weights(full, seed)
    full = dict(full.named_parameters())

    monkeypatch.setitem(initialization.MAX_DRAWN_NUMEL, "cpu", numel)
    ranks = []
    for rank in range(num_ranks):
        local_shapes = {
            name.replace("layers.5", "layers.1"): shard(
                name, torch.empty(shape, device="meta"), rank, num_ranks
            ).shape
            for name, shape in shapes.items()
        }
        # layer 1 of a pipeline stage whose first layer is number 4
        local = Layer(local_shapes)
        draw_weights(local, seed, first_layer=4, rank=rank, num_ranks=num_ranks)
        ranks.append(dict(local.named_parameters()))

    for name, tensor in full.items():
        shards = [local[name.replace("layers.5", "layers.1")] for local in ranks]
        assert torch.equal(unshard(name, shards), tensor), name


def test_weights_in_bf16_are_those_in_fp32_rounded(tiny, seed):
    full, rounded = (
        parameters(tiny("--training.seed", str(seed), "--training.precision", precision))
        for precision in ("fp32", "bf16")
    )
    assert all(torch.equal(rounded[n], p.bfloat16()) for n, p in full.items())


def test_a_layer_of_a_head_may_be_replaced_by_one_that_starts_at_zero(seed):
    layer = initialization.zero_linear(initialization.Linear(3, 5))
    draw_weights(layer, seed)
    assert not any(parameter.any() for parameter in layer.parameters())
