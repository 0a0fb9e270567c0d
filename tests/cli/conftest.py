import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitlm_dist.cli import app


@pytest.fixture(scope="session")
def bitlm():
    """Runs a command in this process; UserErrors are raised, other exit codes are failures."""

    def run(*words, columns=240, code=0):
        # by default tables are wide enough for the paths of temporary folders
        runner = CliRunner(env={"COLUMNS": str(columns)})
        result = runner.invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture(scope="session")
def trained_run(bitlm, tiny_file, prepared, tmp_path_factory) -> Path:
    """A run of three steps. Do not write into it: see :func:`trained`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ("--run.dir", folder, "--data.path", prepared, "--training.steps", 3)
    bitlm("train", tiny_file, *words)
    return folder


@pytest.fixture
def trained(trained_run, tmp_path) -> Path:
    """A run of three steps of this test's own."""
    return Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))
