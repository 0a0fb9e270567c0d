import pytest

from bitlm_dist.errors import UserError
from bitlm_dist.launch.slurm import run_command


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "scontrol: error: resolve_ctls_from_dns_srv\n"
            "scontrol: fatal: Could not establish a configuration source",
            "scontrol finds no Slurm controller here: launch from a login node",
        ),
        ("scontrol: error: Invalid user\n", "scontrol: Invalid user$"),
        ("", "scontrol: exit code 1$"),
    ],
)
def test_a_command_that_fails_is_one_line(answer, message, tmp_path, monkeypatch):
    (tmp_path / "answer").write_text(answer)
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/answer >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=message):
        run_command("scontrol", "ping")


def test_a_machine_without_slurm_says_what_else_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="scontrol is not on the path: .* `bitlm launch local`"):
        run_command("scontrol", "ping")
