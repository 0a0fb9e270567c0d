import errno

import pytest

from bitlm_dist.config_loading import with_absolute_paths
from bitlm_dist.launch import job_files
from bitlm_dist.launch.attempts import LAUNCH
from bitlm_dist.launch.cluster import Cluster
from bitlm_dist.launch.render import Job


@pytest.mark.parametrize("has_attempts", [False, True])
def test_a_start_that_cannot_be_written_leaves_nothing_new(
    has_attempts, tiny, monkeypatch, tmp_path
):
    config = with_absolute_paths(tiny("--run.dir", str(tmp_path / "deep" / "run")))
    run = config.run.dir
    if has_attempts:
        (run / LAUNCH / "attempts").mkdir(parents=True)

    def fail(folder):
        (folder / ".code.json.partial").touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(job_files, "save_code", fail)
    with pytest.raises(OSError, match="No space left"):
        job_files.write_job_files(Job(run, (), 1, Cluster()), config, is_local=True)
    if has_attempts:
        assert [file.name for file in (run / LAUNCH).iterdir()] == ["attempts"]
    else:
        assert not run.parent.exists()
