"""FlashAttention 4, the package flash-attn-4, with the block-causal mask as tile lists for both passes.

Without the lists its kernels would put the mask on every tile: twice the work. The mask reads what a query sees, [low, high), from
tensors, so one kernel serves every block size and document layout.

Forward and backward are operators of torch, ``bitlm::flash_attention_4`` and ``..._backward``, over the functions behind the
package's own autograd function: torch.compile keeps its graph whole, and the backward pass finds its lists by itself.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bitlm_dist.kernels.block_sparse import TileLists, once_per_mask, tile_lists, transposed_tile_lists
from bitlm_dist.kernels.call import Call, on_device_of, seen_by_queries
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
WIDTHS = range(8, 129, 8)
HOPPER = 9  # major compute capability
SPARE = 256  # rows of a tile at most


class Tiles(NamedTuple):
    """Queries and keys of a tile of the lists."""

    forward: tuple[int, int]
    backward: tuple[int, int]


def unsupported(call: Call) -> str | None:
    """Why FlashAttention 4 does not take this call; None if it does. Reads no numbers of the tensors."""
    if call.q.dtype not in DTYPES:
        return f"q is {call.q.dtype}: FlashAttention 4 supports {DTYPES}"
    if call.q.shape[3] not in WIDTHS:
        return f"head width {call.q.shape[3]}: FlashAttention 4 supports multiples of 8 up to {WIDTHS[-1]}"
    if call.differentiated and torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for: FlashAttention 4 sums the gradient of q in no fixed order"
    if call.q.device.type == "meta":
        return None
    if not call.q.is_cuda:
        return f"q is on {call.q.device}: FlashAttention 4 needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(call.q.device)
    if major not in (HOPPER, 10, 11):
        return f"compute capability {major}.{minor}: FlashAttention 4 has no kernels with tile lists for it"
    return None


def attention(call: Call) -> Tensor:
    """Block-causal attention [B, H, S, D], its memory ordered [B, S, H, D]."""
    out: Tensor = _attention(call.q, call.k, call.v, call.bounds, call.block, call.scale)[0]
    return out


def tiles(major: int, width: int) -> Tiles:
    """Tiles that the package's kernels accept for a head width on a major compute capability."""
    if major != HOPPER:
        return Tiles((256, 128), (128, 128))  # the forward kernel works on two tiles of 128 queries at a time
    return Tiles((192 if width <= 96 else 128, 128), (128, 128))


@torch.library.custom_op("bitlm::flash_attention_4", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, block: int, scale: float) -> tuple[Tensor, Tensor]:
    return forward(Call(q, k, v, block, bounds, scale), torch.cuda.get_device_capability(q.device)[0])


@_attention.register_fake
def _empty_results(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("bitlm::flash_attention_4_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(Call(q, k, v, block, bounds, scale), out, lse, dout, torch.cuda.get_device_capability(q.device)[0])


@_attention_backward.register_fake
def _empty_gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bounds, *output)
    ctx.set_materialize_grads(False)  # no gradient ever comes for lse: no zeros for it


def _differentiate(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    q, k, v, bounds, out, lse = ctx.saved_tensors
    if dout is None:
        return (None,) * 6
    return *_attention_backward(dout, q, k, v, out, lse, bounds, ctx.block, ctx.scale), None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def forward(call: Call, major: int) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, D] and the natural log-sum-exp [B, H, S] on a device of this major compute capability."""
    from flash_attn.cute.interface import _flash_attn_fwd

    tile = tiles(major, call.q.shape[3]).forward
    out, lse = _empty(call.q), call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    with on_device_of(call.q):
        _flash_attn_fwd(
            *_by_position(call.q, call.k, call.v),
            softmax_scale=call.scale,
            pack_gqa=False,  # the mask would divide by the group at every row
            mask_mod=_mask(call.bounds is not None),
            aux_tensors=_seen(call),
            block_sparse_tensors=_sparse(tile_lists(call, *tile), tile),
            out=out.transpose(1, 2),
            lse=lse,
        )
    return out, lse


def backward(call: Call, out: Tensor, lse: Tensor, dout: Tensor, major: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, heads, positions, D]."""
    from flash_attn.cute.interface import _flash_attn_bwd

    tile = tiles(major, call.q.shape[3]).backward
    gradients = _empty(call.q), _empty(call.k), _empty(call.v)
    dq, dk, dv = _by_position(*gradients)
    with on_device_of(call.q):
        _flash_attn_bwd(
            *_by_position(call.q, call.k, call.v, out, dout),
            lse,
            softmax_scale=call.scale,
            mask_mod=_mask(call.bounds is not None),
            aux_tensors=_seen(call),
            block_sparse_tensors=_sparse(transposed_tile_lists(call, *tile), tile),
            dq=dq,
            dk=dk,
            dv=dv,
        )
    return gradients


def _by_position(*tensors: Tensor) -> list[Tensor]:
    """[B, heads, positions, D] <-> [B, positions, heads, D], as the package takes them."""
    return [x.transpose(1, 2) for x in tensors]


def _empty(like: Tensor) -> Tensor:
    """[B, heads, positions, D] in the memory order of [B, positions, heads, D]."""
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)


def _sparse(lists: TileLists, tile: tuple[int, int]) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(*lists, block_size=tile)


def _seen(call: Call) -> list[Tensor]:
    """What the mask reads: [high] without documents, else [low, high]."""
    low, high = _padded_runs(call)
    return [high[0]] if call.bounds is None else [low, high]


@once_per_mask
def _padded_runs(call: Call) -> tuple[Tensor, Tensor]:
    # The forward kernel asks the mask about rows past the last query too: there must be memory to read.
    low, high = (F.pad(x, (0, SPARE)) for x in seen_by_queries(call))
    return low, high


@functools.cache
def _mask(documents: bool) -> Any:
    """The mask as a function of CuTe; every call gets the same one, as the package compiles by function."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def in_block(batch, head, query, key, lengths, seen):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return key < scalar_to_ssa(seen[0][query[0]], cutlass.Int32)

    @cute.jit
    def in_block_of_document(batch, head, query, key, lengths, seen):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        low = scalar_to_ssa(seen[0][batch[0], query[0]], cutlass.Int32)
        high = scalar_to_ssa(seen[1][batch[0], query[0]], cutlass.Int32)
        return (key >= low) & (key < high)

    return in_block_of_document if documents else in_block
