"""Cases of training on fake GPUs and what is on file about them; `python traces.py` (part of `make golden`) rewrites the file.

On file are, for a step after the first: where the host waits for the GPU, collectives by group, and the peak of memory.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = HERE / "traces.json"
SMALL = [
    *("--model.backbone.attention", "triton"),  # whatever else is installed
    *("--data.sequence_length", "32", "--training.global_batch_tokens", "256", "--model.backbone.layers", "2"),
    *("--model.backbone.width", "32", "--model.backbone.head_width", "16", "--model.backbone.ffn_width", "48"),
    *("--head.layers", "2", "--head.width", "32", "--head.heads", "2", "--head.group", "3", "--head.components", "2"),
]
PIPELINE, CONTEXT = ["--parallel.pipeline", "2"], ["--parallel.context", "2"]
TENSOR = ["--parallel.tensor", "2", "--parallel.sequence", "true"]
LAYOUTS = {
    "one": (1, []),
    "DP2": (2, []),
    "TP2+SP": (2, TENSOR),
    "PP2": (2, PIPELINE),
    "PP2 VPP2": (2, [*PIPELINE, "--parallel.virtual_pipeline", "2", "--parallel.microbatch", "2", "--model.backbone.layers", "4"]),
    "CP2": (2, CONTEXT),
    "TP2 without SP, microbatches": (2, [*TENSOR[:2], "--parallel.microbatch", "2"]),
    "PP2 DP2": (4, PIPELINE),
    "TP2+SP PP2 CP2 DP2": (16, [*TENSOR, *PIPELINE, *CONTEXT]),
}
HEADS = {
    "replicated": ["--head.engine", "replicated"],
    **{f"ZeRO {stage}": ["--head.zero_stage", str(stage)] for stage in range(4)},
    **{f"FSDP2 {stage}": ["--head.engine", "fsdp2", "--head.zero_stage", str(stage)] for stage in (2, 3)},
    "ZeRO 2 offloaded": ["--head.zero_stage", "2", "--head.offload", "optimizer"],
    "ZeRO 3 offloaded": ["--head.zero_stage", "3", "--head.offload", "all"],
}
OPTIMIZERS = {"Muon": [], "AdamW": ["--optimizer.matrices", "adamw"]}
PRECISIONS = {"fp32": [], "bf16": ["--training.precision", "bf16"]}
MODELS = {
    "default": [],
    "paper": ["--preset", "paper"],
    "softmax": ["--model.output", "softmax", "--model.block_size", "1"],
    "tied": ["--model.output", "softmax", "--model.block_size", "1", "--model.tied", "true"],
}
# layout, rank, head, optimizer, precision, model
QUICK_ROWS = [
    ("one", 0, "replicated", "Muon", "fp32", "default"),
    ("one", 0, "replicated", "AdamW", "bf16", "paper"),
    ("DP2", 1, "ZeRO 2", "Muon", "bf16", "default"),
    ("DP2", 0, "ZeRO 3", "AdamW", "fp32", "paper"),
    ("TP2+SP", 1, "FSDP2 3", "Muon", "fp32", "default"),
    ("PP2 VPP2", 1, "replicated", "AdamW", "bf16", "default"),
    ("CP2", 0, "replicated", "Muon", "bf16", "softmax"),
    ("TP2+SP PP2 CP2 DP2", 15, "ZeRO 2", "AdamW", "bf16", "default"),
]
# With the quick ones: every layout on its first and last rank, with each optimizer and precision; every head with each optimizer,
# each precision that it takes and each preset; the softmax split in every way.
SLOW_ROWS = [
    ("DP2", 0, "ZeRO 0", "AdamW", "fp32", "default"),
    ("DP2", 1, "ZeRO 0", "Muon", "fp32", "paper"),
    ("DP2", 0, "ZeRO 1", "Muon", "fp32", "paper"),
    ("TP2+SP", 0, "ZeRO 1", "AdamW", "fp32", "default"),
    ("CP2", 1, "ZeRO 2", "AdamW", "fp32", "paper"),
    ("TP2+SP", 1, "ZeRO 3", "Muon", "bf16", "default"),
    ("CP2", 0, "FSDP2 2", "AdamW", "bf16", "paper"),
    ("DP2", 1, "FSDP2 2", "Muon", "fp32", "default"),
    ("DP2", 0, "FSDP2 3", "AdamW", "bf16", "paper"),
    ("DP2", 1, "ZeRO 2 offloaded", "Muon", "fp32", "default"),
    ("PP2 DP2", 2, "ZeRO 2 offloaded", "AdamW", "bf16", "paper"),
    ("DP2", 0, "ZeRO 3 offloaded", "AdamW", "fp32", "default"),
    ("DP2", 1, "ZeRO 3 offloaded", "Muon", "bf16", "paper"),
    ("DP2", 0, "replicated", "AdamW", "fp32", "default"),
    ("PP2", 0, "replicated", "Muon", "bf16", "paper"),
    ("PP2", 1, "replicated", "AdamW", "fp32", "default"),
    ("PP2 VPP2", 0, "replicated", "Muon", "fp32", "paper"),
    ("PP2 DP2", 0, "ZeRO 3", "Muon", "fp32", "default"),
    ("PP2 DP2", 3, "ZeRO 3", "Muon", "bf16", "paper"),
    ("PP2 DP2", 3, "FSDP2 3", "AdamW", "fp32", "default"),
    ("TP2 without SP, microbatches", 1, "ZeRO 2", "Muon", "fp32", "default"),
    ("TP2+SP PP2 CP2 DP2", 0, "ZeRO 2", "AdamW", "bf16", "default"),
    ("TP2+SP PP2 CP2 DP2", 15, "FSDP2 2", "Muon", "fp32", "paper"),
    ("DP2", 1, "replicated", "AdamW", "fp32", "softmax"),
    ("TP2+SP", 0, "replicated", "Muon", "bf16", "tied"),
    ("TP2 without SP, microbatches", 0, "replicated", "AdamW", "fp32", "softmax"),
    ("PP2", 1, "replicated", "Muon", "fp32", "softmax"),
]
# The shapes of the paper at the size of a cluster, two microbatches a step: config, GPUs, rank, what keeps a step in memory
LARGE = {
    "0.6B on 8 GPUs": ("bitlm-0.6b", 8, 0, []),
    "8B on 64 GPUs": ("bitlm-8b", 64, 63, ["--parallel.recompute", "full"]),
}
LARGE_SEQUENCE = 16384


def case_of(layout: str, rank: int, *rest: str) -> tuple[str, dict[str, Any]]:
    """-> name of the case, and what :mod:`fake_ranks` is to do."""
    world, words = LAYOUTS[layout]
    head, optimizer, precision, model = rest
    words = [*SMALL, *words, *HEADS[head], *OPTIMIZERS[optimizer], *PRECISIONS[precision], *MODELS[model]]
    name = ", ".join((layout, f"rank {rank}", *rest))
    return name, {"function": "steps", "arguments": [words, None, world, rank]}


QUICK, SLOW = (dict(case_of(*row) for row in rows) for rows in (QUICK_ROWS, SLOW_ROWS))
for name, (config, world, rank, words) in LARGE.items():
    tokens = ["--training.global_batch_tokens", str(2 * world * LARGE_SEQUENCE), "--parallel.microbatch", "1"]
    SLOW[name] = {"function": "steps", "arguments": [[*SMALL[:2], *words, *tokens], config, world, rank, 151_936]}
CASES = QUICK | SLOW


def run(cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run cases in processes of their own -> what they returned, or the end of what they printed.

    Args:
        cases: by name; see :mod:`fake_ranks`.
        folder: empty.
    """
    numbered = [{"name": str(number), **case} for number, case in enumerate(cases.values())]
    (folder / "cases.json").write_text(json.dumps(numbered))
    scripts = str(Path(sys.executable).parent)  # ninja is there
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    command = [sys.executable, str(HERE / "fake_ranks.py"), str(folder / "cases.json"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    found: dict[str, Any] = {}
    for number, name in enumerate(cases):
        file = folder / f"{number}.pickle"
        found[name] = pickle.loads(file.read_bytes()) if file.is_file() else file.with_suffix(".log").read_text()[-3000:]
    return found


def on_file(found: dict[str, Any]) -> dict[str, Any]:
    """What the file holds of a case: its last step."""
    step = max(phase for phase in found["peak"] if phase.startswith("step"))
    return {
        "waits": found["waits"].get(step, {}),
        "collectives": found["collectives"].get(step, {}),
        "peak": found["peak"][step],
    }


def read() -> dict[str, Any]:
    """The file."""
    cases: dict[str, Any] = json.loads(FILE.read_text())
    return cases


def main(names: Collection[str] = ()) -> None:
    """Rewrite the file, and say which cases changed."""
    with tempfile.TemporaryDirectory() as folder:
        ran = run({name: CASES[name] for name in names or CASES}, Path(folder))
    if broken := [f"{name}:\n{found}" for name, found in ran.items() if isinstance(found, str)]:
        sys.exit("\n".join(broken))
    old = read() if FILE.is_file() else {}
    new = {name: on_file(found) for name, found in ran.items()}
    for name, found in new.items():
        print(f"{name}: {'as before' if old.get(name) == found else 'new' if name not in old else 'CHANGED'}")
    FILE.write_text(json.dumps({name: ({**old, **new})[name] for name in CASES if name in {**old, **new}}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
