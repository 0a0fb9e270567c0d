"""Whether a training run fits into its GPUs, checked before anything is built, and what would."""

import os
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from bitlm_dist.config import Config
from bitlm_dist.config_loading import flatten, unflatten
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.errors import UserError
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.device import set_cuda_environment
from bitlm_dist.parallel.layout import ParallelLayout, build_layout, resolve_micro_batch_size
from bitlm_dist.planning.memory import GIB, estimate_worst_rank
from bitlm_dist.training.sharded_head import is_head_sharded

MAX_TENSOR = 8  # tensor ranks talk in every layer, so they should share a node
MAX_PIPELINE = 16
MOST_RECOMPUTED = ("layernorm", "qk_layernorm", "mlp")  # short of full recomputation
MORE_GPUS = (1, 2, 4, 8)  # times those of the job

Changes = dict[str, Any]  # values by dotted key


def check_training_memory(config: Config, layout: ParallelLayout) -> None:
    """Check that the largest stage fits into this rank's GPU; a no-op on a CPU.

    All ranks come to the same result, as all look at the same stage.

    Raises:
        UserError: it does not, and ``training.check_memory`` is true; tells what would fit.
    """
    if not config.training.check_memory or mesh.device().type != "cuda":
        return

    set_cuda_environment(config, os.environ)  # must precede the first CUDA call
    total = torch.cuda.mem_get_info(mesh.device())[1]
    assert config.data.path is not None
    vocab_size = int(read_manifest(config.data.path)["vocabulary"])
    estimate, stage = estimate_worst_rank(config, layout, vocab_size)
    if estimate.needed_bytes <= total:
        return

    where = f"pipeline stage {stage} of {layout.pipeline}" if layout.pipeline > 1 else "a rank"
    margin = estimate.needed_bytes - estimate.peak_bytes
    raise UserError(
        f"training does not fit into the GPU's {total / GIB:.1f} GiB: {where} needs about "
        f"{estimate.needed_bytes / GIB:.1f} GiB, {estimate.state_bytes / GIB:.1f} of them between "
        f"steps and {margin / GIB:.1f} as a margin: {_remedy(config, layout, vocab_size, total)}, "
        "or try all the same with --training.check_memory false"
    )


def _remedy(config: Config, layout: ParallelLayout, vocab_size: int, total: int) -> str:
    """Tell what fits: another layout of these GPUs, or more GPUs."""
    for factor in MORE_GPUS:
        num_gpus = factor * layout.world_size
        changes = find_fit(config, layout, vocab_size, total, num_gpus)
        if changes is not None:
            words = [f"--{key} {_word(value)}" for key, value in changes.items()]
            gpus = [f"on {num_gpus} GPUs"] if factor > 1 else []
            return f"what fits is {' '.join([*words, *gpus])}"
    return f"no layout of {num_gpus} GPUs fits, use more, or a smaller model"


def _word(value: Any) -> str:
    """A value on the command line."""
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value).lower()


def find_fit(
    config: Config, layout: ParallelLayout, vocab_size: int, total: int, num_gpus: int
) -> Changes | None:
    """Find the cheapest change of the layout that fits.

    Args:
        config: a checked config.
        layout: the job's layout.
        vocab_size: number of tokens.
        total: bytes of a GPU.
        num_gpus: number of GPUs to fit.

    Returns:
        The keys to change; None if nothing that is tried fits.
    """
    for changes in _candidates(config, layout):
        changed = with_changes(config, changes)
        if any(changed.problems()):
            continue
        try:
            new_layout = build_layout(changed.parallel, num_gpus, rank=0)
            estimate, _ = estimate_worst_rank(changed, new_layout, vocab_size)
        except UserError:
            continue  # this layout cannot split the batch or the ranks
        if estimate.needed_bytes <= total:
            return changes
    return None


def with_changes(config: Config, changes: Changes) -> Config:
    """The config with other values of some keys."""
    return Config.model_validate(unflatten({**_values(config), **changes}))


def _values(config: Config) -> Changes:
    return dict(flatten(config.model_dump()))


def _candidates(config: Config, layout: ParallelLayout) -> Iterator[Changes]:
    """Changes, the cheapest first: what costs no time, finer splits, recomputation, stages."""
    values = _values(config)
    for pipeline, recomputation, tensor, micro_batch_size, free in product(
        _doublings(layout.pipeline, MAX_PIPELINE),
        _recomputations(config),
        _doublings(layout.tensor, MAX_TENSOR),
        _smaller_microbatches(config, layout),
        _free_changes(config, layout),
    ):
        wanted = {
            "parallel.micro_batch_size": micro_batch_size,
            "parallel.tensor": tensor,
            "parallel.sequence": tensor > 1,
            "parallel.pipeline": pipeline,
            **recomputation,
            **free,
        }
        yield {key: value for key, value in wanted.items() if value != values[key]}


def _recomputations(config: Config) -> list[Changes]:
    """What the backward pass recomputes, the cheapest first; not less than now."""
    policy = "parallel.activation_checkpointing"
    choices: dict[str, list[Changes]] = {
        "none": [{}],
        "selective": [
            {policy: "selective"},
            {policy: "selective", "parallel.recompute_modules": MOST_RECOMPUTED},
        ],
        "full": [{policy: "full"}],
    }
    names = list(choices)
    first = names.index(config.parallel.activation_checkpointing)
    return [changes for name in names[first:] for changes in choices[name]]


def _free_changes(config: Config, layout: ParallelLayout) -> list[Changes]:
    """Nothing, and sharding of state that is held by every rank."""
    changes: Changes = {}
    if layout.num_replicas > 1:
        changes["optimizer.sharded"] = True
    if len(layout.head_ranks()) > 1 and not is_head_sharded(config, layout):
        changes["parallel.head.engine"] = "deepspeed"
    return [{}, changes]


def _smaller_microbatches(config: Config, layout: ParallelLayout) -> list[int]:
    sizes = [config.parallel.micro_batch_size]
    size = resolve_micro_batch_size(config, layout)
    while size > 1:
        size //= 2
        sizes.append(size)
    return sizes


def _doublings(start: int, end: int) -> list[int]:
    """``start`` and its doubles, up to ``end``."""
    return [start, *(start * 2**i for i in range(1, end.bit_length()) if start * 2**i <= end)]
