"""Bytes that stay allocated between steps: weights, gradient buffers, optimizer state, codes.

They follow exactly from the shapes of the rank's parameters; docs/gpu.md has the table.
"""

from collections import Counter

import torch

from bitlm_dist.config import Config
from bitlm_dist.model.backbone import DTYPES
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.planning.rank_parameters import RankParameters, Shapes
from bitlm_dist.training.optimizer import param_group
from bitlm_dist.training.partitioners.deepspeed import PARAM_PERSISTENCE_THRESHOLD
from bitlm_dist.training.sharded_head import is_head_sharded

FP32_BYTES = 4
CODE_BYTES = 8  # int64

# fp32 tensors per weight that an update rule keeps
NUM_SLOTS = {"adamw": 2, "muon": 1}


def weight_bytes(config: Config) -> int:
    """Bytes per element of weights and activations."""
    return DTYPES[config.training.precision].itemsize


def split_head(config: Config, layout: ParallelLayout, shapes: Shapes) -> tuple[Shapes, Shapes]:
    """Split the shapes into Megatron's, and those of the head that an engine of its own shards."""
    if not is_head_sharded(config, layout):
        return shapes, {}
    head = {name: shape for name, shape in shapes.items() if name.startswith("head.")}
    return {name: shape for name, shape in shapes.items() if name not in head}, head


def num_elements(shapes: Shapes) -> int:
    """Elements of all parameters."""
    return sum(shape.numel() for shape in shapes.values())


def state_bytes(config: Config, layout: ParallelLayout, parameters: RankParameters) -> Counter[str]:
    """Bytes between steps by item."""
    dense, head = split_head(config, layout, parameters.shapes)
    items = _dense_bytes(config, layout, dense)
    if head:
        items += _sharded_head_bytes(config, layout, head)

    # a table in each direction
    if config.model.output == "bits":
        items["codes"] += CODE_BYTES * (parameters.vocab_size + 2**parameters.num_bits)
    return items


def _dense_bytes(config: Config, layout: ParallelLayout, shapes: Shapes) -> Counter[str]:
    """What Megatron's data parallelism holds, and the optimizer of its parameters."""
    optimizer = config.optimizer
    size = num_elements(shapes)
    items = Counter(
        {"weights": weight_bytes(config) * size, "gradients": FP32_BYTES * size},
    )

    has_master = weight_bytes(config) < FP32_BYTES

    # Slices of Megatron's distributed optimizer begin and end anywhere: one rank may have all the
    # elements of which the optimizer keeps most.
    num_shards = layout.num_optimizer_shards if optimizer.sharded else 1
    num_slots = _most_slots(config, shapes, size // num_shards)
    return items + _optimizer_bytes(config, num_slots, size / num_shards, has_master)


def _most_slots(config: Config, shapes: Shapes, numel: int) -> int:
    """The most elements that the optimizer can keep for ``numel`` weights of these shapes."""
    numel_by_slots = Counter[int]()
    for name, shape in shapes.items():
        group = param_group(config.optimizer, name, torch.empty(shape, device="meta"))
        numel_by_slots[NUM_SLOTS[group.optimizer]] += shape.numel()

    total = 0
    for num_slots in sorted(numel_by_slots, reverse=True):
        taken = min(numel, numel_by_slots[num_slots])
        total += num_slots * taken
        numel -= taken
    return total


def _optimizer_bytes(
    config: Config, num_slots: float, numel: float, has_master: bool
) -> Counter[str]:
    """What the optimizer keeps of ``numel`` weights: ``num_slots`` elements, and copies."""
    size = round(FP32_BYTES * numel)
    return Counter(
        {
            "optimizer state": round(FP32_BYTES * num_slots),
            "fp32 weights": size if has_master else 0,
            "moving average": size if config.optimizer.ema else 0,
        }
    )


def _sharded_head_bytes(config: Config, layout: ParallelLayout, shapes: Shapes) -> Counter[str]:
    """The head under DeepSpeed or FSDP2; what is offloaded needs no memory on the GPU."""
    parallel = config.parallel.head
    stage = parallel.zero_stage
    num_ranks = len(layout.head_ranks()) // layout.num_head_instances
    size = num_elements(shapes)
    shard_bytes = FP32_BYTES * size // num_ranks
    num_slots = _most_slots(config, shapes, size)  # of all ranks
    items: Counter[str] = Counter()

    # FSDP2's fp32 rows are the only weights, and those of the optimizer.
    if parallel.engine == "fsdp2":
        items["weights"] += shard_bytes
        return items + _optimizer_bytes(
            config, num_slots / num_ranks, size / num_ranks, has_master=False
        )

    if stage == 3:
        # Shards for gradients and for gathering; tensors that are too small to be sharded.
        numels = [shape.numel() for shape in shapes.values()]
        small = sum(n for n in numels if n <= PARAM_PERSISTENCE_THRESHOLD)
        items["weights"] += weight_bytes(config) * small
        items["DeepSpeed's shards"] += (2 if parallel.offload == "all" else 3) * shard_bytes
    if parallel.offload != "all":
        num_shards = num_ranks if stage == 3 else 1
        items["weights"] += weight_bytes(config) * size // num_shards

    if parallel.offload == "none":
        has_master = stage > 0
        num_shards = 1 if stage == 0 else num_ranks
        items += _optimizer_bytes(config, num_slots / num_shards, size / num_shards, has_master)
    elif stage < 3:
        # Gradients go to the host through a buffer for the largest tensor.
        largest = max(map(torch.Size.numel, shapes.values()))
        items["DeepSpeed's shards"] += weight_bytes(config) * largest
    return items
