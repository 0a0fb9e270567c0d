"""What helps where a step does not fit into a GPU."""

from bitlm_dist.config import Config
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.training.sharded_head import is_sharded


def out_of_memory(config: Config, layout: Layout, microbatch: int, error: BaseException) -> str:
    """One line: what the device said, and the keys that lower the memory of a step, the cheapest first.

    Args:
        config: checked.
        layout: of the job.
        microbatch: sequences of a forward pass.
        error: of the device; its first sentences hold what was asked for and what is free.
    """
    keys = []
    if microbatch > 1:
        keys.append(f"--parallel.microbatch {microbatch // 2}")
    if config.parallel.recompute != "full":
        keys.append("--parallel.recompute full")
    if layout.world > 1 and config.model.output == "bits" and not (is_sharded(config, layout) and config.head.zero_stage == 3):
        keys.append("--head.engine deepspeed --head.zero_stage 3")
    if layout.replicas > 1 and not config.optimizer.sharded:
        keys.append("--optimizer.sharded true")
    keys.append(f"--parallel.tensor {2 * layout.tensor} --parallel.sequence true")
    keys.append(f"--parallel.pipeline {2 * layout.pipeline}")

    said = ". ".join(" ".join(str(error).split()).split(". ")[:3])
    return f"{said}: a microbatch of {microbatch} sequences does not fit; what helps: {', '.join(keys)}"
