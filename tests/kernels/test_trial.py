from types import ModuleType

import pytest
import torch
from bitlm_dist.kernels import attention, trial
from bitlm_dist.kernels.call import checked


@pytest.fixture
def call():
    return checked(*(torch.empty(1, heads, 4, 16) for heads in (4, 2, 2)), block=4)


@pytest.fixture(autouse=True)
def _trust(monkeypatch):
    monkeypatch.setattr(attention, "_distrusted", {})


def put_first(monkeypatch, attend):
    """A back end ``triton`` that is here and takes everything."""
    module = ModuleType("triton")
    module.unsupported, module.attention = lambda call: None, attend
    monkeypatch.setitem(attention._modules, "triton", module)
    monkeypatch.setattr(attention, "_missing", lambda name: "not here" if name == "fa4" else None)


def right(call):
    return attention.attend(call, "reference")


def causal_inside_blocks(call):
    return torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, is_causal=True, enable_gqa=True)


def blind_to_documents(call):
    return right(checked(call.q, call.k, call.v, block=call.block))


def wrong_gradient(call):
    return right(call.of(call.q, call.k.detach() * 0.5 + call.k * 0.5, call.v))


def broken(call):
    raise RuntimeError("no C\ncompiler")


def test_a_back_end_that_is_right_is_trusted(call, monkeypatch):
    put_first(monkeypatch, right)
    assert trial.proven(call) == trial.proven(call, "triton") == "triton"


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (causal_inside_blocks, "its output differs from fp64 by 0.*"),
        (blind_to_documents, "its output differs from fp64 by .*"),
        (wrong_gradient, "its gradient 2 differs from fp64 by 0.5 .*"),
        (lambda call: right(call) * torch.nan, "its output differs from fp64 by nan .*"),
        (broken, "it fails: RuntimeError: no C compiler"),
    ],
)
def test_one_that_is_wrong_is_left_out_by_auto_and_refused_by_name(attend, reason, call, monkeypatch, caplog):
    put_first(monkeypatch, attend)
    assert trial.proven(call) == "merge"
    assert [message.partition(", ")[0] for message in caplog.messages] == ["attention back end triton is not used"]
    assert "triton" not in attention.available_backends()
    with pytest.raises(ValueError, match=f"backend 'triton' is not available here: {reason}; choose from .*merge"):
        trial.proven(call, "triton")
    monkeypatch.setattr(attention, "_distrusted", {})
    with pytest.raises(ValueError, match=f"backend 'triton' is not available here: {reason}"):
        trial.proven(call, "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_path_of_cpus_stands_its_trial(dtype):
    q, k, v = (torch.empty(1, heads, 3, 32, dtype=dtype) for heads in (6, 2, 2))
    assert trial.proven(checked(q, k, v, 3)) == "merge"


def test_attention_inside_blocks_has_a_trial_too(monkeypatch):
    from bitlm_dist.kernels import triton_in_block

    monkeypatch.setattr(attention, "_missing", lambda name: None)
    monkeypatch.setattr(triton_in_block, "unsupported", lambda qkv: None)
    monkeypatch.setattr(triton_in_block, "attention", lambda qkv, causal: qkv.select(-3, 2))
    trial.prove_in_block(torch.empty(1, 4, 3, 2, 16))
    assert attention.missing("triton").startswith("inside blocks, its output differs from fp64")
