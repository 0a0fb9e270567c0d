"""Speed and memory of generation, as JSON: `python -m bitlm_dist.acceptance.generation BATCH TOKENS
PROMPT REPEATS VOCABULARY CONFIG OVERRIDES…`.

What `bitlm bench generate` measures, in one process.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from bitlm_dist.bench.generate import GenerationRunner, GenerationWorkload
from bitlm_dist.bench.interleaved import measure_peak_bytes, time_repeat
from bitlm_dist.config_loading import load_config
from bitlm_dist.model.build import prepare_device
from bitlm_dist.strict_json import to_json


def measure_generation(
    config_words: list[str], workload: GenerationWorkload, repeats: int
) -> dict[str, Any]:
    """Generate with an untrained model, once for warming up and then ``repeats`` times."""
    config = load_config(Path(config_words[0]), config_words[1:]).config
    prepare_device(config)
    runner = GenerationRunner(config, workload)

    measured = [time_repeat(runner) for _ in range(1 + repeats)][1:]
    return {
        "batch": workload.batch_size,
        "tokens_per_second": statistics.median(m.tokens / m.seconds for m in measured),
        "peak_bytes": measure_peak_bytes(),
    }


if __name__ == "__main__":
    batch, tokens, prompt, repeats, vocabulary = map(int, sys.argv[1:6])
    workload = GenerationWorkload(vocabulary, batch, tokens, prompt)
    print(to_json(measure_generation(sys.argv[6:], workload, repeats)))
