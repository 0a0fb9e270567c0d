"""FLOPs and memory that fake GPUs predict for training runs, as JSON: `python -m
bitlm_dist.acceptance.predict RUNS`.

Real GPUs must be hidden. RUNS is a JSON object of runs by name, each with ``words``, ``world_size``
and ``vocab_size``.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from bitlm_dist.codes import num_bits_needed
from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.planning.flops import training_flops
from bitlm_dist.planning.trace import trace_steps
from bitlm_dist.strict_json import to_json

NUM_STEPS = 2  # all steps after the second are like it


def predict(config_words: list[str], world_size: int, vocab_size: int) -> dict[str, float]:
    """Predict a training run's costs.

    Args:
        config_words: config and overrides, as after `bitlm train`.
        world_size: number of GPUs.
        vocab_size: number of tokens.

    Returns:
        ``flops_per_token`` of the formula that MFU is based on, and of rank 0's trace
        ``peak_bytes``, ``static_bytes`` and ``flops_per_step``.
    """
    config = load_config(Path(config_words[0]), config_words[1:]).config
    bits = config.model.bits or num_bits_needed(vocab_size)
    flops_per_token = training_flops(config, bits, vocab_size).total

    trace = trace_steps(config, world_size, 0, vocab_size, NUM_STEPS)
    last = f"step {NUM_STEPS - 1}"
    return {
        "flops_per_token": flops_per_token,
        "peak_bytes": max(trace.peak_bytes["build"], trace.peak_bytes[last]),
        "static_bytes": trace.static_bytes[last],
        "flops_per_step": trace.flops[last],
    }


def main() -> None:
    """Read the runs and print a prediction for each."""
    runs: dict[str, Any] = json.loads(sys.argv[1])
    gc.freeze()  # a trace runs the garbage collector often; it need not scan the modules each time
    try:
        found = {
            name: predict(run["words"], run["world_size"], run["vocab_size"])
            for name, run in runs.items()
        }
    except UserError as error:
        print(f"bitlm: {error}", file=sys.stderr)
        sys.exit(2)
    print(to_json(found))


if __name__ == "__main__":
    main()
