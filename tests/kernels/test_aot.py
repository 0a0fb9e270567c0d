import json
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")


def aot(*arguments):
    """Run the module in a separate process: kernels defined under TRITON_INTERPRET cannot be
    compiled.
    """
    command = [sys.executable, "-m", "bitlm_dist.kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_hopper_kernels_keep_their_budgets():
    done = aot("--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90 bf16") == 16
    assert done.stderr == ""


@pytest.mark.slow
def test_a_broken_budget_is_named(tmp_path):
    from bitlm_dist.kernels.aot import BUDGET_FILE

    budgets = json.loads(BUDGET_FILE.read_text()).get(triton.__version__)
    if budgets is None:
        pytest.skip(f"no budgets for Triton {triton.__version__}")

    # one budget is too small, another one is missing
    name = next(x for x in budgets if "sm_90" in x and "in-block forward" in x and "width=64" in x)
    budgets[name]["registers"] -= 1
    missing = budgets.pop(
        next(x for x in budgets if "sm_90" in x and "in-block backward" in x and "width=64" in x)
    )

    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({triton.__version__: budgets}))
    done = aot("--arch", "90", "--width", "64", "--budgets", str(file))

    assert done.returncode == 1
    used = budgets[name]["registers"] + 1
    assert f"{name}: registers {used}, budget {used - 1}" in done.stderr
    assert "no budget: add it with --update" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert missing["stack"] == 0


def test_hard_limits():
    from bitlm_dist.kernels.aot import Usage, attention_cases, violations

    case = next(attention_cases(90, 64))
    assert violations(case, Usage(255, 0, 65536, 24), None) == []
    lines = violations(case, Usage(255, 8, 300_000, 0), None)
    assert [line.partition(": ")[2] for line in lines] == [
        "8 bytes of stack: registers spill",
        "300000 bytes of shared memory, the architecture has 232448",
        "no HGMMA: the products do not run on tensor cores",
    ]
