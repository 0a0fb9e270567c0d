"""Losses and gradient norms of the quickstart model are those on file."""

from dataclasses import replace
from pathlib import Path

import compare
import golden
import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("case", golden.CASES)
def test_losses_and_norms_are_those_on_file(case, sample_data):
    expected = golden.load_golden(HERE / f"{case}.json")
    found = golden.measure(case, sample_data)
    other = golden.machine_difference(expected, found)
    print(
        f"compared within tolerances, as the machine types differ: {other}"
        if other
        else "compared exactly"
    )

    lines = golden.differences(expected, found)
    assert not lines, f"{'; '.join(lines)}: if that is meant, run `make golden` and commit the diff"


def test_differences_are_exact_on_one_machine_type_and_within_tolerances_elsewhere():
    file = golden.load_golden(HERE / "default.json")
    nearly = replace(file, losses=[loss * (1 + 5e-6) for loss in file.losses])
    assert golden.differences(file, file) == []
    assert golden.differences(file, nearly)[0].startswith(
        "loss differs in 20 of 20 steps, first in step 1 ("
    )

    elsewhere = replace(nearly, machine={**file.machine, "instructions": "AVX1"})
    assert golden.differences(file, elsewhere) == []
    assert "instructions" in golden.machine_difference(file, elsewhere)

    far = replace(elsewhere, grad_norms=[*file.grad_norms[:-1], file.grad_norms[-1] * 1.001])
    assert golden.differences(file, far)[0].startswith(
        "gradient norm differs in 1 of 20 steps, first in step 20 ("
    )

    nan = replace(file, losses=[float("nan"), *file.losses[1:]])
    assert golden.differences(file, nan)
    assert golden.differences(file, replace(file, data="other")) == [
        "the prepared text is another: its index has another hash"
    ]
    assert golden.differences(file, replace(file, losses=file.losses[:3])) == ["20 steps and 3"]


def test_two_folders_are_compared_by_the_command(tmp_path, monkeypatch, capsys):
    def compared(a: Path, b: Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["compare.py", str(a), str(b)])
        return compare.main(), capsys.readouterr().out

    file = golden.load_golden(HERE / "paper.json")
    a = tmp_path / "a"
    b = tmp_path / "b"
    golden.save_golden(file, a / "paper.json")
    golden.save_golden(replace(file, losses=[loss + 1 for loss in file.losses]), b / "paper.json")

    assert compared(a, a) == (0, "paper: the same, bit by bit\n")
    code, said = compared(a, b)
    assert code == 1
    assert said.startswith("paper: loss differs in 20 of 20 steps")

    golden.save_golden(file, b / "default.json")
    code, said = compared(a, b)
    assert code == 2
    assert "default.json holds no golden losses" in said
    assert compared(a, tmp_path / "none")[0] == 2
