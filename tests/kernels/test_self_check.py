from types import ModuleType

import pytest
import torch

from bitlm_dist.kernels import attention, self_check
from bitlm_dist.kernels.attention_inputs import validate_inputs


@pytest.fixture
def call():
    return validate_inputs(*(torch.empty(1, heads, 4, 16) for heads in (4, 2, 2)), block=4)


@pytest.fixture(autouse=True)
def _trust(monkeypatch):
    monkeypatch.setattr(attention, "_disabled", {})


def put_first(monkeypatch, attend):
    """Install ``attend`` as a ``triton`` backend that supports every call."""
    module = ModuleType("triton")
    module.unsupported_reason = lambda call: None
    module.attention = attend

    monkeypatch.setitem(attention._modules, "triton", module)
    monkeypatch.setattr(
        attention, "_find_unavailable_reason", lambda name: "not here" if name == "fa4" else None
    )


def right(call):
    return attention.dispatch(call, "reference")


def causal_inside_blocks(call):
    return torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, is_causal=True, enable_gqa=True
    )


def blind_to_documents(call):
    return right(validate_inputs(call.q, call.k, call.v, block=call.block))


def wrong_gradient(call):
    return right(call.with_qkv(call.q, call.k.detach() * 0.5 + call.k * 0.5, call.v))


def broken(call):
    raise RuntimeError("no C\ncompiler")


def test_a_back_end_that_is_right_is_trusted(call, monkeypatch):
    put_first(monkeypatch, right)
    assert (
        self_check.select_verified_backend(call)
        == self_check.select_verified_backend(call, "triton")
        == "triton"
    )


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
def test_one_that_is_wrong_is_left_out_by_auto_and_refused_by_name(
    attend, reason, call, monkeypatch, caplog
):
    put_first(monkeypatch, attend)
    assert self_check.select_verified_backend(call) == "merge"
    assert [message.partition(", ")[0] for message in caplog.messages] == [
        "attention backend triton is not used"
    ]
    assert "triton" not in attention.available_backends()

    with pytest.raises(
        ValueError, match=f"backend 'triton' is not available here: {reason}; choose from .*merge"
    ):
        self_check.select_verified_backend(call, "triton")

    # also on the first call by name
    monkeypatch.setattr(attention, "_disabled", {})
    with pytest.raises(ValueError, match=f"backend 'triton' is not available here: {reason}"):
        self_check.select_verified_backend(call, "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_path_of_cpus_passes_its_check(dtype):
    q, k, v = (torch.empty(1, heads, 3, 32, dtype=dtype) for heads in (6, 2, 2))
    assert self_check.select_verified_backend(validate_inputs(q, k, v, 3)) == "merge"


def test_attention_inside_blocks_has_a_check_too(monkeypatch):
    from bitlm_dist.kernels import triton_in_block

    monkeypatch.setattr(attention, "_find_unavailable_reason", lambda name: None)
    monkeypatch.setattr(triton_in_block, "unsupported_reason", lambda qkv: None)
    monkeypatch.setattr(triton_in_block, "attention", lambda qkv, causal: qkv.select(-3, 2))

    self_check.verify_in_block_kernels(torch.empty(1, 4, 3, 2, 16))
    assert attention.unavailable_reason("triton").startswith(
        "inside blocks, its output differs from fp64"
    )
