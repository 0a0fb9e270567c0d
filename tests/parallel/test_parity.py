"""Any layout trains the same model to the same numbers: gloo ranks against one process."""

import pytest
import torch
from parity import OVERLAPPING
from ranks import mark_by_duration, run_ranks, selected_cases

pytestmark = pytest.mark.distributed
ADAMW = ["--optimizer.matrix_optimizer", "adamw", "--optimizer.weight_decay", "0.1"]
SP = ["--parallel.tensor", "2", "--parallel.sequence", "true"]
TWO = {
    "TP2": ["--parallel.tensor", "2"],
    "TP2+SP": SP,
    "PP2": ["--parallel.pipeline", "2"],
    "PP2 VPP2": ["--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2"],
    "CP2": ["--parallel.context", "2"],
    "DP2": [],
    "DP2, overlapping": [OVERLAPPING, "--parallel.head.engine", "replicated"],
    "DP2, whole optimizer on every rank": ["--optimizer.sharded", "false"],
    "TP2+SP, recomputing layers": [*SP, "--parallel.activation_checkpointing", "full"],
    "PP2, recomputing steps": [
        "--parallel.pipeline",
        "2",
        "--parallel.activation_checkpointing",
        "selective",
    ],
    "TP2+SP, recomputing the MLP": [
        *SP,
        "--parallel.activation_checkpointing",
        "selective",
        "--parallel.recompute_modules",
        "[layernorm, qk_layernorm, mlp]",
    ],
}
EIGHT = {
    "TP2 PP2 DP2": ["--parallel.tensor", "2", "--parallel.pipeline", "2"],
    "CP2 TP2+SP DP2": [*SP, "--parallel.context", "2"],
    "TP2 DP4 as 2x2": ["--parallel.tensor", "2", "--parallel.optimizer_shard_ranks", "2"],
}


BF16 = ["--training.precision", "bf16"]
KINDS = {"Muon": [], "AdamW": ADAMW}
ROUNDED = {"bf16 Muon": BF16, "bf16 AdamW": [*BF16, *ADAMW]}


def cases_of(layouts, kinds=KINDS):
    return {
        f"{name}, {kind}": [*words, *more]
        for name, words in layouts.items()
        for kind, more in kinds.items()
    }


SOFTMAX = ["--model.output", "softmax", "--model.block_size", "1"]
# From seed 0, the gradients of four elements of the table are zero but for rounding, and AdamW
# divides each by its own size.
TIED = ["--model.tie_embeddings", "true", "--training.seed", "1"]
BASELINE = {
    "TP2, softmax": [*SP[:2], *SOFTMAX],
    "TP2+SP, softmax": [*SP, *SOFTMAX],
    "TP2, tied": [*SP[:2], *SOFTMAX, *TIED],
    "TP2+SP, tied": [*SP, *SOFTMAX, *TIED],
    "PP2, softmax": ["--parallel.pipeline", "2", *SOFTMAX],
    "CP2, softmax": ["--parallel.context", "2", *SOFTMAX],
    "DP2, overlapping, softmax": [OVERLAPPING, *SOFTMAX],
}
DETACHED = ["--diffusion.detached_losses", "[denoising, context, autoregressive, next_token]"]
ONE = {
    **KINDS,
    **ROUNDED,
    "softmax": SOFTMAX,
    "tied": [*SOFTMAX, *TIED],
    "all losses detached": DETACHED,
}
TWO_CASES = {
    **cases_of(TWO),
    **BASELINE,
    **cases_of({"PP2": TWO["PP2"]}, {"all losses detached": DETACHED}),
    **cases_of({name: TWO[name] for name in ("TP2+SP", "PP2", "CP2", "DP2")}, ROUNDED),
}


EIGHT_CASES = cases_of(EIGHT)
# Each axis of parallelism, each optimizer and each output of the model once.
QUICK = {
    *("TP2+SP, Muon", "PP2 VPP2, AdamW", "CP2, Muon", "DP2, AdamW", "TP2, softmax"),
    *("DP2, overlapping, Muon", "DP2, overlapping, softmax"),
}
# With the quick ones, every layout once, and with each optimizer the layouts that shard its state:
# data-parallel ranks and pipeline stages.
SLOW = {
    *("TP2, AdamW", "TP2+SP, recomputing layers, AdamW", "CP2, AdamW"),
    *("PP2, Muon", "PP2, AdamW", "PP2, recomputing steps, Muon", "DP2, Muon"),
    "TP2+SP, recomputing the MLP, AdamW",
    *(f"DP2, whole optimizer on every rank, {kind}" for kind in KINDS),
    *("TP2+SP, bf16 Muon", "PP2, bf16 AdamW", "CP2, bf16 AdamW", "DP2, bf16 Muon"),
    *("TP2+SP, tied", "PP2, softmax", "CP2, softmax", "PP2, all losses detached"),
    *("TP2 PP2 DP2, Muon", "CP2 TP2+SP DP2, AdamW", "DP2, overlapping, AdamW"),
    *(f"TP2 DP4 as 2x2, {kind}" for kind in KINDS),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, request):
    """Every case on its number of ranks, and its optimizer and precision on one."""
    folder = tmp_path_factory.mktemp
    two = selected_cases(request, TWO_CASES)
    eight = selected_cases(request, EIGHT_CASES)
    kinds = {"Muon", *(case.rpartition(", ")[2] for case in [*two, *eight])}
    one = run_ranks(
        1,
        "parity",
        "train_all",
        {kind: ONE[kind] for kind in ONE if kind in kinds},
        folder=folder("one"),
    )[0]

    jobs = [(2, two), (8, eight)]
    many = [
        run_ranks(size, "parity", "train_all", cases, folder=folder(str(size)))
        for size, cases in jobs
        if cases
    ]
    return one, {case: seen for ranks in many for case, seen in ranks[0].items()}, many


@pytest.mark.parametrize("case", mark_by_duration([*TWO_CASES, *EIGHT_CASES], QUICK, SLOW))
def test_a_layout_trains_what_one_process_trains(case, found):
    one, many, ranks = found
    losses, parameters, held = many[case]
    expected_losses, expected, _ = one[case.rpartition(", ")[2]]
    # tolerances of losses, norms, parameters
    near = (2e-2, 2e-2, 2e-2) if "bf16" in case else (1e-5, 1e-4, 1e-4)

    for (loss, norm), (expected_loss, expected_norm) in zip(losses, expected_losses, strict=True):
        assert loss == pytest.approx(expected_loss, rel=near[0])
        assert norm == pytest.approx(expected_norm, rel=near[1])
    assert parameters.keys() == expected.keys()

    worst = max(
        (parameters[name].float() - expected[name].float()).abs().max().item() for name in expected
    )
    loss_error = max(abs(a - b) / b for (a, _), (b, _) in zip(losses, expected_losses, strict=True))
    print(
        f"{case} | {loss_error:.0e} | {worst:.0e} | "
        + " | ".join(f"{size / 2**10:.0f}" for size in held)
    )

    assert worst < near[2]
    for rank in next(job for job in ranks if case in job[0]):
        assert rank[case][0] == losses, "all ranks report the same"


def test_training_moved_the_parameters(found):
    """Parity of models that stand still would prove nothing."""
    one = found[0]["Muon"]
    assert one[0][-1][0] < one[0][0][0]
    assert torch.linalg.vector_norm(one[1]["head.context_out.weight"]) > 0


BLOCK = ["--model.attention", "block", "--diffusion.next_token_loss_weight", "0"]
MASKS = {"CP2": ["--parallel.context", "2"], "TP2+SP": SP}


def test_gradients_are_zero_exactly_where_the_mask_forbids_them(tmp_path):
    """Documents of 20, 24 and 20 tokens; blocks of four, seen whole or causally."""
    cases = {
        f"{name} {kind}": [*words, *more]
        for name, words in MASKS.items()
        for kind, more in (("causal", []), ("block", BLOCK))
    }
    queries = [0, 5, 19, 20, 38, 43, 63]
    found = run_ranks(2, "parity", "reach_all", cases, queries, folder=tmp_path)[0]

    for case, reached in found.items():
        for query in queries:
            first = max(start for start in (0, 20, 44) if start <= query)
            last = query if case.endswith("causal") else query // 4 * 4 + 3
            assert reached[query] == list(range(first, last + 1)), f"{case}, token {query}"
