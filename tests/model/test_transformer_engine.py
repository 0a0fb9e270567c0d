"""fp8: who may use it, and that the weights are those of bf16. The products need a GPU."""

import sys

import pytest
import torch

from bitlm_dist.errors import UserError
from bitlm_dist.model.backbone import _transformer_config
from bitlm_dist.model.backbone_layer import layer_spec
from bitlm_dist.model.build import build_meta_model, prepare_device
from bitlm_dist.model.transformer_engine import check_fp8
from bitlm_dist.parallel.layout import SINGLE_PROCESS
from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import load_trained_model, model_state_dict

FP8 = ("--training.precision", "fp8")
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Factory of what torch says of a GPU."""

    def pretend(name, *capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    return pretend


def test_a_cpu_and_an_old_gpu_are_refused(gpu, tiny, tmp_path):
    with pytest.raises(UserError, match="^training.precision = fp8 needs a GPU: use bf16 or fp32$"):
        Trainer.build(tiny(*FP8))
    assert not (tmp_path / "run").exists()

    gpu("A100", 8, 0)
    with pytest.raises(UserError, match="fp8: A100 has no fp8 matrix products: use bf16$"):
        check_fp8(GPU)


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_transformer_engine_that_cannot_be_imported_is_refused(error, gpu, monkeypatch, tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}('libcudart.so.12: no such file\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)

    gpu("H100", 9, 0)
    with pytest.raises(UserError, match=r"imported \(libcudart.so.12: no such file\): pip install"):
        check_fp8(GPU)


def test_only_the_linear_maps_of_the_layers_are_others(tiny, monkeypatch):
    # without Transformer Engine, Megatron's classes exist, but are stand-ins without a name
    for name in ("TEColumnParallelLinear", "TERowParallelLinear"):
        monkeypatch.setattr(
            f"megatron.core.extensions.transformer_engine.{name}", type(name, (), {})
        )

    fp8, bf16 = (layer_spec(precision).submodules for precision in ("fp8", "bf16"))
    for part, names in (
        ("self_attention", ("linear_qkv", "linear_proj")),
        ("mlp", ("linear_fc1", "linear_fc2")),
    ):
        mine, theirs = (getattr(spec, part).submodules for spec in (fp8, bf16))
        for name in vars(theirs):
            found, plain = getattr(mine, name), getattr(theirs, name)
            expected = f"TE{plain.__name__}" if name in names else getattr(plain, "__name__", None)
            assert getattr(found, "__name__", None) == expected
    assert fp8.input_layernorm is bf16.input_layernorm

    config = _transformer_config(tiny(*FP8), SINGLE_PROCESS, [2])
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", "tensorwise", False)
    assert config.params_dtype == torch.bfloat16
    assert not config.use_cpu_initialization, "or Megatron allocates full matrices on the host"
    assert _transformer_config(tiny(), SINGLE_PROCESS, [2]).fp8 is None


def test_a_model_is_sized_without_transformer_engine(tiny):
    fp8, bf16 = (
        build_meta_model(tiny("--training.precision", precision), 300, 9).named_parameters()
        for precision in ("fp8", "bf16")
    )
    assert [(n, p.shape, p.dtype) for n, p in fp8] == [(n, p.shape, p.dtype) for n, p in bf16]


@pytest.mark.integration
def test_a_model_trained_in_fp8_is_evaluated_in_bf16_anywhere(tiny, tmp_path):
    words = ("--parallel.head.zero_stage", "2", "--training.precision")
    trainer = Trainer.build(tiny(*words, "bf16")).open()
    trainer.fit(until=1)
    trainer.close()

    _, model, _ = load_trained_model(tmp_path / "run", tiny(*words, "fp8"))
    trained = model_state_dict(trainer.engine.chunks)
    for name, tensor in model_state_dict([model]).items():
        assert torch.equal(tensor.full, trained[name].full), name


def test_the_precision_of_fp32_products_is_set_before_training(tiny):
    try:
        for precision in ("high", "highest"):
            prepare_device(tiny("--training.float32_matmul_precision", precision))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
