"""Which tiles of keys a tile of queries needs, and which without a mask: the lists of FlexAttention and FlashAttention 4.

What a query sees is one run of keys whose ends never fall from one query to the next, so the first and last row of a tile say all
of it: the lists cost O(tiles x tiles), are made on the device, and nothing waits for them. No S x T mask exists.

Legend: B batch, S queries, T keys; NQ, NK tiles of queries and of keys.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from bitlm_dist.kernels.call import Call, seen_by_queries
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

Sizes = ParamSpec("Sizes")
Made = TypeVar("Made")
KEPT = 16  # masks in memory at a time, for each function and document layout


class TileLists(NamedTuple):
    """For each tile of one side its tiles of the other: the first ``count`` of ``index``, ascending; the rest is filler."""

    partial_count: Tensor  # int32 [B or 1, 1, N]: tiles that need the mask
    partial_index: Tensor  # int32 [B or 1, 1, N, tiles of the other side]
    full_count: Tensor  # int32 [B or 1, 1, N]: tiles that every row sees whole
    full_index: Tensor  # int32 [B or 1, 1, N, tiles of the other side]


def once_per_mask(make: Callable[Concatenate[Call, Sizes], Made]) -> Callable[Concatenate[Call, Sizes], Made]:
    """Let the layers of a forward pass share what ``make`` builds from the mask of a call: its sizes, block and bounds.

    ``make`` must read nothing else of the call, and return no view of the bounds: what belongs to them goes when they go.
    """
    without_documents: dict[Any, Made] = {}
    with_documents = WeakIdKeyDictionary()  # bounds -> what was made of them

    @functools.wraps(make)
    def shared(call: Call, /, *sizes: Sizes.args, **named: Sizes.kwargs) -> Made:
        if not _outlives(call):
            return make(call, *sizes, **named)
        store, version = without_documents, 0
        if call.bounds is not None:
            store = with_documents.setdefault(call.bounds, {})
            version = call.bounds._version  # bounds may be a buffer that every batch is copied into
        key = (call.block, call.q.shape[2], call.k.shape[2], call.q.device, version, sizes, *named.items())
        if key not in store:
            while len(store) >= KEPT:
                store.pop(next(iter(store)))
            # An evaluation may come first: training could not save its inference tensors for the backward pass.
            with torch.inference_mode(False):
                store[key] = make(call, *sizes, **named)
        return store[key]

    return shared


def _outlives(call: Call) -> bool:
    """Whether tensors made now are still good in the next call."""
    if torch.compiler.is_compiling() or isinstance(call.q, FakeTensor):
        return False
    if call.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # they belong to the graph, which fills them anew at every replay
    return call.bounds is None or not call.bounds.is_inference()


@once_per_mask
def tile_lists(call: Call, tile_queries: int, tile_keys: int) -> TileLists:
    """For each tile of queries the tiles of keys to visit, N = NQ.

    A tile that reaches past the last query or key is partial: the kernels check their borders together with the mask.
    """
    first, last, first_full, last_full = _visits(call, tile_queries, tile_keys)
    tile = torch.arange(first.shape[1], device=first.device)
    last_full = last_full.where(tile < call.q.shape[2] // tile_queries, 0)
    return _lists(first, last, first_full, last_full, _tiles(call.k.shape[2], tile_keys))


@once_per_mask
def transposed_tile_lists(call: Call, tile_queries: int, tile_keys: int) -> TileLists:
    """The same tiles by columns: for each tile of keys the tiles of queries that visit it, N = NK."""
    # The ends of the runs never fall from one tile of queries to the next: those that visit a tile of keys are a run too.
    keys, queries = (_tiles(x.shape[2], tile) for x, tile in ((call.k, tile_keys), (call.q, tile_queries)))
    visits = _visits(call, tile_queries, tile_keys)
    at = torch.arange(keys, device=call.q.device, dtype=torch.int32).expand(visits[0].shape[0], -1).contiguous()
    last, first, last_full, first_full = (torch.searchsorted(x.contiguous(), at, right=True, out_int32=True) for x in visits)
    whole = call.q.shape[2] // tile_queries
    return _lists(first, last, first_full, last_full.clamp(max=whole), queries)


def _tiles(positions: int, tile: int) -> int:
    return -(-positions // tile)


def _visits(call: Call, tile_queries: int, tile_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs of tiles of keys, int32 [B or 1, NQ] each: first and end of those visited, first and end of the full ones.

    An empty run of full tiles may end before it begins. A last tile of queries that is not whole counts as if it were.
    """
    low, high = seen_by_queries(call)
    tiles = _tiles(low.shape[1], tile_queries)
    first_row = slice(None, None, tile_queries)
    last_low, last_high = (torch.cat((x[:, tile_queries - 1 :: tile_queries], x[:, -1:]), 1)[:, :tiles] for x in (low, high))
    first = low[:, first_row] // tile_keys
    last = (last_high + (tile_keys - 1)) // tile_keys
    first_full = (last_low + (tile_keys - 1)) // tile_keys
    last_full = high[:, first_row] // tile_keys
    return first, last, first_full, last_full


def _lists(first: Tensor, last: Tensor, first_full: Tensor, last_full: Tensor, width: int) -> TileLists:
    """Runs [B or 1, N] -> lists of ``width`` entries; partial tiles are those of the run before and after the full ones."""
    first, last, first_full, last_full = (x[:, None] for x in (first, last, first_full, last_full))  # one list for all heads
    full = (last_full - first_full).clamp(min=0)
    entry = torch.arange(width, device=first.device, dtype=torch.int32)
    left = (first_full - first)[..., None]
    partial_index = first[..., None] + entry + torch.where(entry < left, 0, full[..., None])
    full_index = first_full[..., None] + entry
    # Kernels may read one entry past the count, so filler names a tile too.
    partial_index, full_index = (x.clamp(max=width - 1) for x in (partial_index, full_index))
    return TileLists(last - first - full, partial_index, full, full_index)
