"""Memory that training or generation needs, by formula, before anything is built."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from bitlm_dist.codes import num_bits_needed
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ParallelLayout
from bitlm_dist.parallel.partition import ROUND_NUMEL
from bitlm_dist.planning.activation_memory import backbone_bytes, layer_backward_bytes
from bitlm_dist.planning.head_memory import head_bytes, head_engine_bytes
from bitlm_dist.planning.rank_parameters import RankParameters, rank_parameters
from bitlm_dist.planning.state_memory import (
    CODE_BYTES,
    num_elements,
    state_bytes,
    weight_bytes,
)
from bitlm_dist.planning.step_sizes import StepSizes

GIB = 2**30

# What tensors do not show: the CUDA context and loaded kernels (about 1 GiB), NCCL's buffers of
# some ten groups (2 to 4 GiB), workspaces of cuBLAS (under 1 GiB). Assumed, not measured.
FIXED_MARGIN_BYTES = 6 * GIB
# Free blocks of the allocator that are too small for what is asked, as a share of the peak.
FRAGMENTATION = 0.05

# Copies of the full matrices of a round at the peak of Muon's update: sent, received, joined,
# stacked, and those of the iteration.
MUON_COPIES = 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.

    Attributes:
        state: what stays allocated between steps, by item.
        activations: what is saved for the backward pass at the peak, by item.
        momentary: what each phase of a step needs besides.
    """

    state: Counter[str]
    activations: Counter[str]
    momentary: dict[str, float]

    @property
    def state_bytes(self) -> int:
        """Bytes between steps."""
        return sum(self.state.values())

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes allocated at one time."""
        return self.state_bytes + round(max(self.momentary.values()))

    @property
    def needed_bytes(self) -> int:
        """The peak with the margin."""
        return with_margin(self.peak_bytes)


def with_margin(peak_bytes: int) -> int:
    """Bytes that a GPU must have for tensors of ``peak_bytes``."""
    return FIXED_MARGIN_BYTES + round((1 + FRAGMENTATION) * peak_bytes)


def estimate_training(config: Config, layout: ParallelLayout, vocab_size: int) -> MemoryEstimate:
    """Estimate the memory of the layout's rank.

    Args:
        config: a checked config.
        layout: the layout, and the rank in it.
        vocab_size: number of tokens.

    Raises:
        UserError: the global batch cannot be split over the layout.
    """
    parameters = rank_parameters(config, layout, vocab_size)
    sizes = StepSizes.of(config, layout)
    state = state_bytes(config, layout, parameters)
    activations = backbone_bytes(config, layout, parameters, sizes)
    saved = sum(activations.values())

    momentary = {
        "optimizer": _optimizer_bytes(config, parameters),
        "backward pass of a layer": saved + layer_backward_bytes(config, layout, sizes),
    }
    if parameters.is_last:
        head = head_bytes(config, parameters, sizes)
        engine = head_engine_bytes(config, layout, parameters, sizes)
        activations["head"] = round(head.saved)
        # Only later microbatches find the engine's buffers when they compute the loss.
        in_forward = engine if sizes.num_microbatches > 1 else 0
        momentary["loss"] = saved + head.saved + head.forward + in_forward
        momentary["backward pass of the head"] = saved + head.saved + head.backward + engine
        momentary["backward pass of a layer"] += engine
    return MemoryEstimate(state, activations, momentary)


def _optimizer_bytes(config: Config, parameters: RankParameters) -> float:
    """What the update needs: nothing for AdamW, full matrices for others."""
    if config.optimizer.matrix_optimizer == "adamw":
        return 0.0
    numel = min(ROUND_NUMEL, num_elements(parameters.shapes))
    return MUON_COPIES * weight_bytes(config) * numel


def estimate_worst_rank(
    config: Config, layout: ParallelLayout, vocab_size: int
) -> tuple[MemoryEstimate, int]:
    """Estimate the pipeline stage that needs most.

    Returns:
        Its estimate, and its number.
    """
    ranks_per_stage = layout.world_size // layout.pipeline
    estimates = [
        estimate_training(config, replace(layout, rank=stage * ranks_per_stage), vocab_size)
        for stage in range(layout.pipeline)
    ]
    worst = max(range(layout.pipeline), key=lambda stage: estimates[stage].peak_bytes)
    return estimates[worst], worst


def training_bytes(config: Config, vocab_size: int) -> int:
    """Bytes that training takes at its peak on a single process."""
    return estimate_training(_unsplit(config), SINGLE_PROCESS, vocab_size).peak_bytes


def generation_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of weights and codes; caches and activations are small compared with them."""
    parameters = rank_parameters(_unsplit(config), SINGLE_PROCESS, vocab_size)
    num_codes = vocab_size + 2 ** num_bits_needed(vocab_size)
    return weight_bytes(config) * num_elements(parameters.shapes) + CODE_BYTES * num_codes


def _unsplit(config: Config) -> Config:
    """The config of a single process, whatever layout it names."""
    stages = {"pipeline": 1, "virtual_pipeline": 1, "layers_per_stage": None}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=stages)})


def check_memory(bytes_by_model: Mapping[str, int]) -> None:
    """Check that models fit into the free memory at the same time.

    Raises:
        UserError: they do not; tells the needs of each model and the free memory.
    """
    device = mesh.device()
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )

    if sum(bytes_by_model.values()) > free:
        each = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in bytes_by_model.items())
        raise UserError(
            f"the models need about {each}, and {free / GIB:.1f} GiB are free on {device.type}: "
            "use a smaller model, training.global_batch_tokens or parallel.micro_batch_size, "
            "or compare one at a time"
        )
