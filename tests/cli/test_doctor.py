import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bitlm_dist.cli import app, doctor


@pytest.fixture(autouse=True)
def no_watch(monkeypatch):
    monkeypatch.setattr(doctor, "WATCH_SECONDS", 0.0)


def findings(*words):
    result = CliRunner().invoke(app, ["doctor", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_findings_as_json_are_those_of_the_tables():
    found = json.loads(findings("--json"))
    assert found.keys() == dict(doctor.iter_findings()).keys()
    assert set(found["packages"][0]) == {"name", "found", "note"}

    output = findings()
    for heading, records in found.items():
        assert heading in output
        assert all(record["name"] in output for record in records)

    # a broken backend is found, too
    attention = {record["name"]: record["found"] for record in found[list(found)[2]]}
    assert attention["reference"]
    assert attention["merge"]


def test_a_count_agrees_with_its_noun(monkeypatch):
    import torch

    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notes = {finding.name: finding.note for finding in dict(doctor.iter_findings())["machine"]}
    assert notes["device"] == "CPU, 1 core, 3 threads, gloo"


def test_a_package_that_fails_on_import_is_not_found(tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("raise OSError('libcudart.so: no such file')")
    (tmp_path / "broken" / "part.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._importable("broken")
    assert not doctor._importable("broken.part")

    monkeypatch.setattr(doctor, "package_version", lambda package: "2.6")
    finding = doctor._optional_package("Broken", "broken.part", "broken", "speed")
    assert finding == ("Broken", False, "2.6 is installed, but cannot be imported")


@pytest.mark.slow
def test_nothing_heavy_is_imported_but_torch():
    """The versions come from the installed metadata, before torch is imported."""
    code = """
import sys
from bitlm_dist.cli.doctor import iter_findings
findings = iter_findings()
heading, packages = next(findings)
assert heading == "packages" and "torch" in {f.name for f in packages}
assert "torch" not in sys.modules
others = dict(findings)
assert others["machine"][0].name == "import torch", others["machine"]
assert float(others["machine"][0].note.split()[0]) > 0
assert "torch" in sys.modules
heavy = {"torch._dynamo", "megatron.core", "deepspeed", "streaming", "triton", "wandb"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
