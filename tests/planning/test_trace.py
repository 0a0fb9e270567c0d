"""The real training step on fake GPUs: no tensor on the wrong device, no unknown wait of the host,
all memory accounted for.
"""

import json
import math
import os
import shutil

import pytest
import torch
from traces import (
    CASES,
    FILE,
    HEADS,
    LARGE,
    LAYOUTS,
    QUICK,
    QUICK_ROWS,
    READ,
    SLOW_ROWS,
    load_traces,
    run_cases,
    to_record,
)

from bitlm_dist.config_loading import load_config
from bitlm_dist.model.initialization import unshard
from bitlm_dist.training.optimizer import is_inner_matrix
from bitlm_dist.training.optimizers.muon import orthogonalize_flops
from bitlm_dist.training.trainer import Trainer

SETTLED = 1.01  # times the recorded peak: small increases need no explanation
HEAD_WEIGHTS = "DeepSpeed: weights of a part of the head"
GRADIENTS = "DeepSpeed: gradients of a microbatch"
PAGEABLE = "copy of pageable memory to the device"

# Reasons why the host waits for the GPU in a step, by source line: all of them DeepSpeed's, but for
# offloading, where the update runs on the host. Nothing may be added.
WAITS = {
    f"runtime/utils.py mask_nan_or_inf_with_val_inplace: {PAGEABLE}": "DeepSpeed: the norm",
    "runtime/utils.py is_invalid_grad_norm: item": "DeepSpeed: the norm",
    f"zero/stage3.py get_grad_norm_direct: {PAGEABLE}": "DeepSpeed: the norm",
    "zero/stage_1_and_2.py independent_gradient_partition_epilogue: synchronize": GRADIENTS,
    "zero/stage3.py independent_gradient_partition_epilogue: synchronize": GRADIENTS,
    "zero/stage3.py __reduce_and_partition_ipg_grads: synchronize": GRADIENTS,
    "zero/partitioned_param_coordinator.py _fetch_sub_module_impl: synchronize": HEAD_WEIGHTS,
    # offload copies between host and device
    "training/optimizer.py update: copy to the host": "clipping of offloaded partitions",
    "parallel/partition.py _map_round: copy to the host": "Muon of offloaded partitions",
    f"parallel/partition.py _map_round: {PAGEABLE}": "Muon of offloaded partitions",
    f"zero/partition_parameters.py <listcomp>: {PAGEABLE}": "offload",
    f"zero/partition_parameters.py _allgather_params_coalesced: {PAGEABLE}": "offload",
    "zero/partition_parameters.py _allgather_params_coalesced: synchronize": "offload",
    f"zero/stage3.py complete_grad_norm_calculation_for_cpu_offload: {PAGEABLE}": "offload",
    "zero/stage3.py complete_grad_norm_calculation_for_cpu_offload: copy to the host": "offload",
    "zero/stage3.py complete_grad_norm_calculation_for_cpu_offload: item": "offload",
    "zero/stage_1_and_2.py _wait_for_offload_copies: synchronize": "offload",
    f"zero/stage_1_and_2.py complete_grad_norm_calculation_for_cpu_offload: {PAGEABLE}": "offload",
    "zero/stage_1_and_2.py complete_grad_norm_calculation_for_cpu_offload: item": "offload",
    "zero/stage_1_and_2.py update_offload_overflow_tracker: item": "offload",
}
# The training loop, without the engine, whose waits are those of a step.
TRAINER_FILES = {
    f"training/{name}.py"
    for name in ("agreement", "batches", "readback", "step_metrics", "step_pipeline", "trainer")
}
TENSOR_BYTES = 512  # smallest allocation
ROWS, WIDTH = 4096, 256  # of the region


# `bitlm` commands, including their command line; a name in braces is a folder
SCORED = [
    "--evaluation.num_sequences",
    "8",
    "--evaluation.num_noise_levels",
    "2",
    "--evaluation.num_sampled_blocks",
    "8",
]
TAUGHT = ["--distillation.teacher", "{softmax}", "--evaluation.every_steps", "2", *SCORED]
TRAIN = [
    "train",
    "{config}",
    "--data.path",
    "{data}",
    "--training.steps",
    "3",
    "--checkpoint.every_steps",
    "2",
]
ODE, SDE = (["--sampling.sampler", name, "--sampling.steps", "3"] for name in ("ode", "sde"))
COMMANDS = {
    "train, with a teacher and evaluations": [
        *TRAIN,
        "--run.dir",
        "{new}/run",
        "--training.precision",
        "bf16",
        "--evaluation.num_samples",
        "1",
        *TAUGHT,
    ],
    "eval": ["eval", "{bits}", *SCORED],
    "generate": ["generate", "{bits}", "--prompt", "the light", "--blocks", "2"],
    "train, going on": ["train", "{stopped}/config.yaml"],
    "train, a softmax": [*TRAIN, "--run.dir", "{new}/fresh", "--model.output", "softmax"],
    "eval, a softmax": ["eval", "{softmax}", *SCORED],
    "generate, ode": ["generate", "{bits}", "--blocks", "2", *ODE, "--sampling.confidence", "0.5"],
    "generate, sde, guided": [
        "generate",
        "{bits}",
        "--blocks",
        "2",
        *SDE,
        "--sampling.guidance",
        "1.5",
    ],
    "generate, a softmax": ["generate", "{softmax}", "--blocks", "2"],
    "checkpoint export": ["checkpoint", "export", "{bits}", "{new}/exported"],
}
REFUSED = "train, too large for the GPU"
LARGE_MODEL = [
    *("--model.backbone.hidden_size", "8192", "--data.sequence_length", "512"),
    *("--training.global_batch_tokens", "4096"),
]
QUICK_COMMANDS = ("train, with a teacher and evaluations", "eval", "generate")


# BitLM-8B with Muon on one node, its first and its last tensor rank
TENSOR_RANKS = 8
MUON = {
    f"Muon of a third of 8B on TP8, rank {rank}": {
        "function": "optimizer_step",
        "arguments": [
            [
                *("--optimizer.matrix_optimizer", "muon", "--data.sequence_length", "1024"),
                *("--training.global_batch_tokens", "1024", "--parallel.sequence", "true"),
                *("--parallel.tensor", str(TENSOR_RANKS), "--model.backbone.attention", "triton"),
                *("--model.backbone.num_layers", "12"),  # enough for two rounds of matrices
            ],
            *("bitlm-8b", TENSOR_RANKS, rank),
        ],
    }
    for rank in (0, TENSOR_RANKS - 1)
}


@pytest.fixture(scope="module")
def traced(request, tmp_path_factory):
    """Summary of the trace of every selected case."""
    if torch.version.cuda is None and not any(
        map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))
    ):
        (pytest.fail if os.environ.get("BITLM_FAKE_GPU") == "require" else pytest.skip)(
            "a fake GPU needs a C++ compiler here"
        )
    tests = [
        item
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    names = {test.callspec.params.get("case") for test in tests}
    cases = {name: case for name, case in (CASES | MUON).items() if name in names}
    if "a region" in names:
        cases["a region"] = {"function": "region", "arguments": [ROWS, WIDTH]}
    if commands := [name for name in COMMANDS if name in names]:
        folders = request.getfixturevalue("folders")
        for name in commands:
            words = [word.format(**folders) for word in COMMANDS[name]]
            cases[name] = {"function": "command", "arguments": [words]}
    if REFUSED in names:
        folders = request.getfixturevalue("folders")
        words = [word.format(**folders) for word in (*TRAIN, "--run.dir", "{new}/none")]
        arguments = [[*words, *LARGE_MODEL], 1, 7 * 2**30]
        cases[REFUSED] = {"function": "refusal", "arguments": arguments}
    return run_cases(cases, tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module")
def folders(prepared, tiny_file, tmp_path_factory):
    """Inputs of the commands: a config, data, and runs that were trained on a CPU."""
    new = tmp_path_factory.mktemp("runs")
    config = new / "config.yaml"

    # head_dim must be supported by the GPU kernels
    config.write_text(tiny_file.read_text().replace("head_dim: 8", "head_dim: 16"))
    found = {"config": config, "data": prepared, "new": new}
    for name, words in (
        ("bits", ["--diffusion.context_dropout", "0.1"]),
        ("softmax", ["--model.output", "softmax"]),
        ("stopped", []),
    ):
        found[name] = new / name
        settings = [
            "--data.path",
            str(prepared),
            "--run.dir",
            str(found[name]),
            "--training.steps",
            "4",
        ]
        trainer = Trainer.build(
            load_config(config, [*settings, "--optimizer.schedule", "constant", *words]).config
        ).open()
        trainer.fit(until=2)
        trainer.close()
    return found


@pytest.fixture
def found(traced, case):
    assert case == REFUSED or not isinstance(traced[case], str), traced[case]
    return traced[case]


by_case = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)


def reads(found):
    """How often the host reads the report of a step, by phase."""
    counts = {phase: waits.get(READ, 0) for phase, waits in found["waits"].items()}
    return {phase: count for phase, count in counts.items() if count}


@by_case
def test_a_step_waits_sends_and_holds_what_is_on_file(case, found):
    expected, seen = load_traces()[case], to_record(found)
    assert "step 0" not in reads(found), "a step is read after the next one was launched"
    assert reads(found)["step 1"] == 1
    assert set(seen["waits"]) <= set(WAITS), "the host waits for the GPU where it did not"
    assert seen["waits"] == expected["waits"]
    assert seen["collectives"] == expected["collectives"]
    assert seen["peak"] <= SETTLED * expected["peak"], (
        f"`python tests/planning/traces.py {case!r}` after a look at why"
    )


@pytest.mark.parametrize(
    "case",
    [pytest.param(n, marks=[] if n in QUICK_COMMANDS else pytest.mark.slow) for n in COMMANDS],
)
def test_commands_run_on_a_gpu(case, found):
    """No tensor is on the wrong device, from the command line to the last byte of a checkpoint."""
    assert found["peak"] or "export" in case, "it used the GPU"

    # in training itself, beside evaluations and saves
    waits = {place for phase in found["waits"].values() for place in phase}
    own = {place for place in waits if place.split(" ")[0] in TRAINER_FILES}
    assert own == ({READ} if case.startswith("train") else set())


@pytest.mark.parametrize("case", [REFUSED])
def test_a_run_that_does_not_fit_is_refused(case, found, folders):
    assert "training does not fit into the GPU's 7.0 GiB: a rank needs about" in found
    assert found.count("\n") == 1
    assert not (folders["new"] / "none").exists()


@pytest.mark.parametrize("case", ["a region"])
def test_a_compiled_region_is_one_kernel_that_keeps_its_inputs(case, found):
    of_rows, row, matrix = 4 * ROWS * WIDTH, 4 * WIDTH, 4 * WIDTH**2
    assert found["kernels"] == {
        ("add_and_norm", False): 1,
        ("mm.default", False): 1,
        ("mm.default", True): 2,
        ("add_and_norm backward", True): 2,
    }
    assert found["bytes"] == {
        ("add_and_norm", False): 4 * of_rows + row,  # two tensors and a weight to two tensors
        ("mm.default", False): 2 * of_rows + matrix,
        ("mm.default", True): 4 * of_rows + 2 * matrix,
        # each reads the inputs and two gradients; one writes two gradients, one the weight's
        ("add_and_norm backward", True): 2 * (4 * of_rows + row) + 2 * of_rows + row,
    }
    assert found["allocated"] == 2 * of_rows, "only the outputs, no intermediate result"


@pytest.mark.slow
@pytest.mark.parametrize("case", MUON)
def test_tensor_ranks_share_muon_in_bounded_memory(case, found):
    flops = sum(
        orthogonalize_flops(unshard(name, [torch.empty(shape, device="meta")] * TENSOR_RANKS).shape)
        for name, shape in found["parameters"].items()
        if name.startswith("backbone.") and len(shape) == 2
    )
    # the head's matrices are less than 3 % of the backbone's, and shared too
    assert 0.9 * flops < TENSOR_RANKS * found["flops"]["optimizer"] <= 1.1 * flops

    assert found["peak"]["optimizer"] <= found["static"]["build"] + 4 * 2**30
    received = sum(size for name, group, size in found["sent"]["optimizer"] if group == "tensor")
    # this rank's shards of the backbone in bf16, and the matrices that it owns, twice
    assert received < 2 * 2 * 1.1 * sum(map(math.prod, found["parameters"].values()))


def rounded(numbers, width):
    return -(-numbers * width // TENSOR_BYTES) * TENSOR_BYTES


def formula(case, parameters, buffers):
    """Bytes on one GPU between steps: weights, gradients, optimizer state, tables, positions."""
    optimizer, precision, _ = case.split(", ")[-3:]
    width = 4 if precision == "fp32" else 2
    sizes = {name: math.prod(shape) for name, shape in parameters.items()}
    total = sum(rounded(size, width) for size in sizes.values())
    total += rounded(sum(sizes.values()), 4)  # one buffer of gradients
    for name, size in sizes.items():
        muon = optimizer == "Muon" and is_inner_matrix(
            name, torch.empty(parameters[name], device="meta")
        )
        # AdamW has a step counter per tensor
        total += rounded(size, 4) if muon else 2 * rounded(size, 4) + TENSOR_BYTES
        total += rounded(size, 4) if precision == "bf16" else 0  # fp32 copies
    assert buffers["codes.code_of_token"] == 8 * 300
    assert buffers["codes.token_of_code"] == 8 * 2**9
    return total + sum(rounded(size, 1) for size in buffers.values()) + rounded(32, 8)


@pytest.mark.parametrize("case", [name for name in QUICK if name.startswith("one")])
def test_static_bytes_equal_a_formula(case, found):
    assert found["static"]["checkpoint"] == formula(case, found["parameters"], found["buffers"])


def test_the_file_has_every_case_and_no_other():
    found = json.loads(FILE.read_text())
    assert list(found) == list(CASES)
    assert {place for case in found.values() for place in case["waits"]} == set(WAITS), (
        "a wait that is gone leaves the list"
    )


def test_cases_cover_what_they_say():
    rows = QUICK_ROWS + SLOW_ROWS
    for layout, (world, _) in LAYOUTS.items():
        ranks = {rank for name, rank, *_ in rows if name == layout}
        assert world == 1 or ranks & {0, world - 1}, layout
    for head in HEADS:
        kinds = {optimizer for _, _, name, optimizer, *_ in rows if name == head}
        assert kinds == {"AdamW", "Muon"}, head
    assert len(LARGE) == 2
