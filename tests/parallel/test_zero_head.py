"""The head sharded by ZeRO or FSDP2 trains to the same weights as in one process.

Its memory is divided over the ranks, and other pipeline stages never meet the engine.
"""

import importlib.metadata

import pytest
from ranks import mark_by_duration, run_ranks, selected_cases

from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.sharded_head import check_head_engine

pytestmark = pytest.mark.distributed

# AdamW normalises gradients: one that is mere rounding error gives an arbitrary update of size lr.
COMMON = [
    "--optimizer.adamw_lr",
    "5e-4",
    "--optimizer.max_grad_norm",
    "0.3",
    "--optimizer.weight_decay",
    "0.1",
]
# every part by a rule of its own
COMMON += [
    "--optimizer.head.lr_scale",
    "0.8",
    "--optimizer.head.weight_decay",
    "0.3",
    "--optimizer.input.lr_scale",
    "0.5",
]
KINDS = {"AdamW": ["--optimizer.matrix_optimizer", "adamw"], "Muon": []}
TWO = {"DP2": []}
STAGES = {
    "PP2 DP2": ["--parallel.pipeline", "2"],
    "TP2 PP2": ["--parallel.tensor", "2", "--parallel.pipeline", "2"],
}


def stage(number, *more):
    return ["--parallel.head.zero_stage", str(number), *more]


ENGINES = {f"ZeRO {number}": stage(number) for number in range(4)}
ENGINES |= {
    f"FSDP2 {number}": stage(number, "--parallel.head.engine", "fsdp2") for number in (2, 3)
}
ENGINES |= {
    f"ZeRO {number}, offloaded": stage(number, "--parallel.head.offload", what)
    for number, what in ((2, "optimizer"), (3, "all"))
}


def cases_of(layouts, engines, kinds=KINDS):
    return {
        f"{layout}, {engine}, {kind}": [*COMMON, *words, *more, *chosen]
        for layout, words in layouts.items()
        for engine, more in engines.items()
        for kind, chosen in kinds.items()
    }


ZERO = {
    name: words for name, words in ENGINES.items() if name[-1].isdigit() and name.startswith("ZeRO")
}
TWO_CASES = cases_of(TWO, ENGINES)
INTERLEAVED = ["--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2"]
STAGES_CASES = {
    **cases_of(STAGES, ZERO, {"AdamW": KINDS["AdamW"]}),
    **cases_of(
        STAGES, {name: ZERO[name] for name in ("ZeRO 2", "ZeRO 3")}, {"Muon": KINDS["Muon"]}
    ),
}
STAGES_CASES |= cases_of(
    {"PP2 VPP2 DP2": INTERLEAVED}, {"ZeRO 3": ZERO["ZeRO 3"]}, {"AdamW": KINDS["AdamW"]}
)
AS_TWO_BY_TWO = ["--parallel.head.shard_ranks", "2", "--parallel.optimizer_shard_ranks", "2"]
FOUR_CASES = cases_of(
    {"DP4": []}, {name: ENGINES[name] for name in ("ZeRO 3", "FSDP2 3")}, {"Muon": KINDS["Muon"]}
)
FOUR_CASES |= cases_of(
    {"DP4 as 2x2": AS_TWO_BY_TWO}, {name: ENGINES[name] for name in ("FSDP2 2", "FSDP2 3")}
)


LOOKS = {name: words for name, words in ENGINES.items() if name[-1].isdigit()}
BF16 = ["--training.precision", "bf16"]
MICRO = ["--parallel.micro_batch_size", "2", "--optimizer.matrix_optimizer", "adamw"]
LOOKS = {
    f"{name} {kind}": [*words, *more]
    for name, words in LOOKS.items()
    for kind, more in (("fp32", []), ("bf16", BF16))
}
del LOOKS["ZeRO 0 bf16"], LOOKS["ZeRO 1 bf16"]
LOOK_TWO = {f"2 ranks | {name}": [*words, *MICRO] for name, words in LOOKS.items()}
LOOK_STAGES = {
    f"PP2 DP2 | {name}": [*words, *STAGES["PP2 DP2"]]
    for name, words in LOOKS.items()
    if name.startswith("ZeRO")
}
LOOK_FOUR = {f"4 ranks | {name}": [*words, *MICRO] for name, words in LOOKS.items()}


STAGED = "PP2 DP2, ZeRO 3, AdamW"
# Each sharding engine, each optimizer and pipeline stages once; memory per rank in both precisions.
QUICK = {"DP2, ZeRO 2, AdamW", "DP2, ZeRO 3, Muon", "DP2, FSDP2 2, AdamW", STAGED}
QUICK_LOOKS = {"2 ranks | ZeRO 2 bf16", "2 ranks | ZeRO 3 fp32"}
# With the quick ones, every engine meets each optimizer, and so does every layout except the
# interleaved one, which is there for its schedule.
SLOW = {
    *(
        f"DP2, {case}"
        for case in (
            "ZeRO 0, AdamW",
            "ZeRO 0, Muon",
            "ZeRO 1, Muon",
            "FSDP2 2, Muon",
            "FSDP2 3, AdamW",
        )
    ),
    *(f"DP2, ZeRO {number}, offloaded, {kind}" for number in (2, 3) for kind in KINDS),
    *(
        "PP2 DP2, ZeRO 1, AdamW",
        "PP2 DP2, ZeRO 2, Muon",
        "TP2 PP2, ZeRO 2, AdamW",
        "TP2 PP2, ZeRO 3, Muon",
    ),
    *("PP2 VPP2 DP2, ZeRO 3, AdamW", "DP4, FSDP2 3, Muon"),
    *("DP4 as 2x2, FSDP2 2, AdamW", "DP4 as 2x2, FSDP2 3, Muon"),
}
# With the quick ones, in each precision every engine, both numbers of ranks, and pipeline stages.
SLOW_LOOKS = {
    *(
        f"2 ranks | {case}"
        for case in ("ZeRO 0 fp32", "ZeRO 1 fp32", "ZeRO 2 fp32", "FSDP2 2 bf16", "FSDP2 3 fp32")
    ),
    *(
        f"4 ranks | {case}"
        for case in ("ZeRO 2 bf16", "ZeRO 3 fp32", "FSDP2 2 fp32", "FSDP2 3 bf16")
    ),
    *("PP2 DP2 | ZeRO 1 fp32", "PP2 DP2 | ZeRO 3 bf16"),
}
TRAINED = {**TWO_CASES, **STAGES_CASES, **FOUR_CASES}
LOOKED_AT = {**LOOK_TWO, **LOOK_STAGES, **LOOK_FOUR}
by_look = pytest.mark.parametrize("case", mark_by_duration(LOOKED_AT, QUICK_LOOKS, SLOW_LOOKS))


@pytest.fixture(scope="module")
def ran(tmp_path_factory, request):
    """Reports of all ranks, by the name of the job.

    A rank that entered a collective without the others would hang until the time limit.
    """
    kinds = {case.rpartition(", ")[2] for case in selected_cases(request, TRAINED)}
    jobs = {
        "one": (1, {kind: [*COMMON, *KINDS[kind]] for kind in kinds}, {}),
        "two": (2, selected_cases(request, TWO_CASES), selected_cases(request, LOOK_TWO)),
        "stages": (4, selected_cases(request, STAGES_CASES), selected_cases(request, LOOK_STAGES)),
        # not one job with the stages: a process can have one world of DeepSpeed
        "four": (4, selected_cases(request, FOUR_CASES), selected_cases(request, LOOK_FOUR)),
    }

    return {
        name: run_ranks(
            ranks, "zero", "run", trained, looked_at, folder=tmp_path_factory.mktemp(name)
        )
        for name, (ranks, trained, looked_at) in jobs.items()
        if trained or looked_at
    }


@pytest.fixture(scope="module")
def found(ran):
    one = ran["one"][0]
    return one, {case: seen for ranks in ran.values() for case, seen in ranks[0].items()}


@pytest.fixture
def looks(ran, case):
    """Reports of all ranks on a case."""
    ranks = next(ranks for ranks in ran.values() if case in ranks[0])
    return [rank[case] for rank in ranks]


@pytest.mark.parametrize("case", mark_by_duration(TRAINED, QUICK, SLOW))
def test_a_sharded_head_trains_what_one_process_trains(case, found):
    one, many = found
    losses, parameters = many[case]
    expected_losses, expected = one[case.rpartition(", ")[2]]
    loss_error = max(abs(a - b) / b for (a, _), (b, _) in zip(losses, expected_losses, strict=True))
    norm_error = max(abs(a - b) / b for (_, a), (_, b) in zip(losses, expected_losses, strict=True))

    assert parameters.keys() == expected.keys()
    worst = max((parameters[name] - expected[name]).abs().max().item() for name in expected)
    print(f"{case.replace(', ', ' | ')} | {loss_error:.0e} | {norm_error:.0e} | {worst:.0e}")
    assert loss_error < 1e-6
    assert norm_error < 1e-6
    assert worst < 1e-5
    assert max(norm for _, norm in losses) > 0.3, "clipping was active"
    assert min(norm for _, norm in losses) > 0


@by_look
def test_every_block_is_denoised_once(case, looks):
    assert sum(rank["blocks"][0] for rank in looks) == looks[0]["blocks"][1] > 0


@by_look
def test_a_norm_that_is_not_finite_skips_both_optimizers_on_all_ranks(case, looks):
    assert all(rank["skipped"] for rank in looks)

    # the next step is as if there had been no skipped one, so no gradient is left of it
    for rank in looks:
        assert rank["went on"] == pytest.approx(rank["expected"], rel=1e-6)
        assert rank["went on"] == looks[0]["went on"]

    assert any(rank["moved"] for rank in looks)
    assert all(rank["poisoned"] == (True, True) for rank in looks)


@by_look
def test_the_whole_head_writes_the_same_on_every_rank(case, looks):
    written = looks[0]["written"]
    assert all(rank["written"] == written for rank in looks)
    assert written or "PP2" in case
    assert all(0 <= token < 300 for block in written for token in block)


@by_look
def test_the_partition_is_real(case, looks):
    """Bytes per element of the head, by ZeRO stage.

    Stage 1 shards AdamW's two moments and the fp32 weights, stage 2 also gradients, stage 3 also
    weights.
    """
    held = [rank["bytes"] for rank in looks if rank["bytes"]]
    group = len(held)
    number = held[0]["numbers"]
    weights, gradients, state = (
        max(rank[part] for rank in held) / number for part in ("weights", "gradients", "state")
    )
    print(f"{case} | {group} | {weights:.2f} | {gradients:.2f} | {state:.2f}")
    _, name, stage, precision = case.rsplit(" ", 3)

    if stage == "0":
        return
    level = int(stage)
    zero = name == "ZeRO"
    width = 2 if precision == "bf16" and name == "ZeRO" else 4
    slack = 1.05 if zero else 1.1  # padding; FSDP2 deals whole rows
    small = 0.15 * width if zero else 0.0  # small tensors, which ZeRO-3 leaves whole

    assert weights <= (width / group * slack + small if level == 3 or not zero else width)
    # ZeRO-2 in fp32 keeps a tensor that lies on two ranks whole on both until the update
    split = level == 3 or not zero or (level == 2 and precision == "bf16")
    assert gradients <= (4 / group * slack if split else 4)
    assert 8 / group <= state <= 12 / group * slack


@pytest.mark.parametrize("case", [STAGED])
def test_no_rank_of_another_stage_knows_of_deepspeed(case, ran):
    """Only ranks of the last stage import DeepSpeed, and it never communicates with the others."""
    assert [rank["met"][case] for rank in ran["stages"]] == [False, False, True, True]
    assert all(rank["world calls"] == [] for ranks in ran.values() for rank in ranks)


def test_another_version_of_deepspeed_is_refused(monkeypatch):
    config = load_config(None, []).config
    two = ParallelLayout(data=2)
    check_head_engine(config, two)
    found = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.18.2" if name == "deepspeed" else found(name)
    )

    with pytest.raises(
        UserError,
        match=r"head.engine = deepspeed: DeepSpeed 0.18.2 is installed, but tested is 0.19.8",
    ):
        check_head_engine(config, two)

    check_head_engine(config, ParallelLayout())  # nothing to shard
    check_head_engine(load_config(None, ["--parallel.head.engine", "fsdp2"]).config, two)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--parallel.head.engine", "fsdp2", "--parallel.head.zero_stage", "1"],
            r"parallel.head.zero_stage = 1: parallel.head.engine = fsdp2 has stages 2 and 3 only",
        ),
        (
            ["--training.precision", "bf16", "--parallel.head.zero_stage", "1"],
            r"parallel.head.zero_stage = 1 would add up gradients",
        ),
        (
            ["--parallel.head.engine", "replicated", "--parallel.head.offload", "optimizer"],
            r"parallel.head.offload = optimizer needs parallel.head.engine = deepspeed",
        ),
        (
            ["--parallel.head.offload", "all"],
            r"parallel.head.offload = all needs parallel.head.zero_stage of at least 3, not 2",
        ),
    ],
)
def test_what_an_engine_lacks_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        load_config(None, words)
