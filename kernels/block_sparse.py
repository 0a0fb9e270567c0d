"""Block-sparse tile lists for FlexAttention and FlashAttention 4: the tiles of keys that a tile of
queries attends to, and which of them need no mask.

A query attends to one contiguous range of keys, and both ends are non-decreasing from one query to
the next. So the first and last row of a tile determine its list: the lists cost O(tiles x tiles),
are built on the device, and need no synchronization. No S x T mask is ever materialized.

Legend: B batch, S queries, T keys; NQ tiles of queries, NK tiles of keys.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from bitlm_dist.kernels.attention_inputs import AttentionInputs, visible_key_ranges

Sizes = ParamSpec("Sizes")
Result = TypeVar("Result")
MAX_CACHED_MASKS = 16  # per function and document layout


class TileLists(NamedTuple):
    """For each of N tiles of one side, the tiles of the other side that it interacts with.

    The first ``num_…`` entries of ``…_index`` are valid and ascending; the rest is padding.
    """

    num_partial: Tensor  # int32 [B or 1, 1, N]: tiles that need the mask
    partial_index: Tensor  # int32 [B or 1, 1, N, tiles of the other side]
    num_full: Tensor  # int32 [B or 1, 1, N]: tiles without a masked entry
    full_index: Tensor  # int32 [B or 1, 1, N, tiles of the other side]


def cache_per_mask(
    make: Callable[Concatenate[AttentionInputs, Sizes], Result],
) -> Callable[Concatenate[AttentionInputs, Sizes], Result]:
    """Cache what ``make`` builds from the mask of a call, so that all layers share it.

    The mask is defined by the sizes, the block size and the document bounds. ``make`` must depend
    on nothing else of the call. It must not return a view of the bounds: entries are dropped when
    their bounds are freed.
    """
    without_documents: dict[Any, Result] = {}
    with_documents = WeakIdKeyDictionary()  # bounds -> cache of their masks

    @functools.wraps(make)
    def shared(inputs: AttentionInputs, /, *sizes: Sizes.args, **named: Sizes.kwargs) -> Result:
        if not _is_cacheable(inputs):
            return make(inputs, *sizes, **named)

        store = without_documents
        version = 0
        if inputs.document_bounds is not None:
            store = with_documents.setdefault(inputs.document_bounds, {})
            # bounds may be a buffer that every batch is copied into
            version = inputs.document_bounds._version

        key = (
            inputs.block,
            inputs.q.shape[2],
            inputs.k.shape[2],
            inputs.q.device,
            version,
            sizes,
            *named.items(),
        )
        if key not in store:
            while len(store) >= MAX_CACHED_MASKS:
                store.pop(next(iter(store)))

            # The first call may be an evaluation, and autograd cannot save inference tensors.
            with torch.inference_mode(False):
                store[key] = make(inputs, *sizes, **named)

        return store[key]

    return shared


def _is_cacheable(inputs: AttentionInputs) -> bool:
    """True if tensors made now remain valid in the next call."""
    if torch.compiler.is_compiling() or isinstance(inputs.q, FakeTensor):
        return False

    # tensors of a captured graph are overwritten by every replay
    if inputs.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return False

    return inputs.document_bounds is None or not inputs.document_bounds.is_inference()


@cache_per_mask
def tile_lists(inputs: AttentionInputs, tile_queries: int, tile_keys: int) -> TileLists:
    """Build the tiles of keys that each tile of queries visits, N = NQ.

    A tile that extends past the last query or key is partial, as the kernels check the bounds
    together with the mask.
    """
    first, last, first_full, last_full = _tile_runs(inputs, tile_queries, tile_keys)

    # an incomplete last tile of queries has no full tiles
    tile = torch.arange(first.shape[1], device=first.device)
    last_full = last_full.where(tile < inputs.q.shape[2] // tile_queries, 0)
    return _to_tile_lists(
        first, last, first_full, last_full, _num_tiles(inputs.k.shape[2], tile_keys)
    )


@cache_per_mask
def transposed_tile_lists(inputs: AttentionInputs, tile_queries: int, tile_keys: int) -> TileLists:
    """Transpose :func:`tile_lists`: the tiles of queries that visit each tile of keys, N = NK."""
    num_key_tiles, num_query_tiles = (
        _num_tiles(x.shape[2], tile)
        for x, tile in ((inputs.k, tile_keys), (inputs.q, tile_queries))
    )

    # The ends of the runs are non-decreasing from one tile of queries to the next. So the tiles of
    # queries that visit a tile of keys are a run as well, found by binary search.
    visits = _tile_runs(inputs, tile_queries, tile_keys)
    at = (
        torch.arange(num_key_tiles, device=inputs.q.device, dtype=torch.int32)
        .expand(visits[0].shape[0], -1)
        .contiguous()
    )
    last, first, last_full, first_full = (
        torch.searchsorted(x.contiguous(), at, right=True, out_int32=True) for x in visits
    )

    num_full_query_tiles = inputs.q.shape[2] // tile_queries
    return _to_tile_lists(
        first, last, first_full, last_full.clamp(max=num_full_query_tiles), num_query_tiles
    )


def _num_tiles(num_positions: int, tile: int) -> int:
    return -(-num_positions // tile)


def _tile_runs(
    inputs: AttentionInputs, tile_queries: int, tile_keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs of tiles of keys that each tile of queries visits, and of the full ones among them.

    A run of full tiles that is empty may end before it begins. An incomplete last tile of queries
    is treated as complete.

    Returns:
        first, last, first_full, last_full: int32 [B or 1, NQ] each; ends are exclusive.
    """
    low, high = visible_key_ranges(inputs)
    num_query_tiles = _num_tiles(low.shape[1], tile_queries)

    # ranges of the first and the last row of each tile; an incomplete tile ends with the last query
    first_row = slice(None, None, tile_queries)
    last_low, last_high = (
        torch.cat((x[:, tile_queries - 1 :: tile_queries], x[:, -1:]), 1)[:, :num_query_tiles]
        for x in (low, high)
    )

    # visited: keys of any row; full: keys of every row
    first = low[:, first_row] // tile_keys
    last = (last_high + (tile_keys - 1)) // tile_keys
    first_full = (last_low + (tile_keys - 1)) // tile_keys
    last_full = high[:, first_row] // tile_keys
    return first, last, first_full, last_full


def _to_tile_lists(
    first: Tensor, last: Tensor, first_full: Tensor, last_full: Tensor, num_entries: int
) -> TileLists:
    """Expand runs [B or 1, N] into lists of ``num_entries`` entries.

    Partial tiles are the ones of the run before and after the full ones.
    """
    # one list for all heads
    first, last, first_full, last_full = (x[:, None] for x in (first, last, first_full, last_full))
    full = (last_full - first_full).clamp(min=0)
    entry = torch.arange(num_entries, device=first.device, dtype=torch.int32)

    # partial entries skip the full tiles
    left = (first_full - first)[..., None]
    partial_index = first[..., None] + entry + torch.where(entry < left, 0, full[..., None])
    full_index = first_full[..., None] + entry

    # Kernels may read one entry past the count, so padding must be a valid tile as well.
    partial_index, full_index = (x.clamp(max=num_entries - 1) for x in (partial_index, full_index))
    return TileLists(last - first - full, partial_index, full, full_index)
