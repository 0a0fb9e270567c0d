import subprocess
import sys

import pytest

from bitlm_dist import disks
from bitlm_dist.data.shards import DocumentShards
from bitlm_dist.errors import UserError


def fill(disk, left):
    """Fill a disk so that ``left`` bytes are free."""
    size = disks.free_bytes(disk) - left
    (disk / "filler").write_bytes(bytes(max(0, size)))


def test_words_for_sizes():
    assert [disks.format_bytes(size) for size in (0, 900, 2**20, 3 * 2**29)] == [
        "0 bytes",
        "900 bytes",
        "1 MiB",
        "1.5 GiB",
    ]


def test_a_disk_that_is_full_small_or_read_only_is_named(small_disk, monkeypatch):
    assert disks.write_problem(small_disk, 2**20) == ""
    assert (
        disks.write_problem(small_disk, 2**23)
        == f"{small_disk} has 4 MiB free, and 8 MiB are needed"
    )

    fill(small_disk, 0)
    assert (
        disks.write_problem(small_disk, 1)
        == f"{small_disk} cannot be written (No space left on device)"
    )

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert (
        disks.write_problem(small_disk, 1)
        == f"{small_disk} cannot be written (Read-only file system)"
    )

    monkeypatch.setenv("TMPDIR", str(small_disk))
    assert (
        "cannot be written (Read-only file system): make room, or set TMPDIR"
        in disks.temp_dir_problem()
    )
    monkeypatch.setenv("TMPDIR", str(small_disk / "none"))
    assert "none cannot be written (No such file or directory)" in disks.temp_dir_problem()


def test_data_are_not_read_without_shared_memory(prepared, small_disk, monkeypatch):
    """Without the check, streaming writes to missing pages, and SIGBUS kills the process."""
    monkeypatch.setattr(disks, "SHARED_MEMORY", small_disk)
    DocumentShards(prepared, "train").close()
    fill(small_disk, 2**19)
    with pytest.raises(
        UserError,
        match=r"reading the data needs shared memory: .* has 512 KiB free, "
        "and 1 MiB are needed: .*--shm",
    ):
        DocumentShards(prepared, "train")


def test_shards_that_no_temporary_folder_takes_are_named_before(
    prepared, small_disk, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("TMPDIR", str(small_disk))
    fill(small_disk, 2**19)
    with pytest.raises(
        UserError, match="reading the data without data.cache needs temporary files: .* set TMPDIR"
    ):
        DocumentShards(prepared, "train")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]

    monkeypatch.setattr("bitlm_dist.data.shards.free_bytes", lambda folder: 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    DocumentShards(prepared, "train").close()
    assert "has 1,000 bytes free, and the shards of" in capsys.readouterr().err.replace(
        "1e+03", "1,000"
    )
    DocumentShards(prepared, "train", cache_limit="1gb").close()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.integration
def test_a_full_shared_memory_is_one_line_and_no_bus_error(tiny, prepared, tmp_path):
    """Runs the command in a mount namespace whose /dev/shm is full."""
    script = "mount -t tmpfs -o size=64k none /dev/shm && "
    script += 'head -c 65536 /dev/zero >/dev/shm/filler && exec "$@"'
    command = [
        sys.executable,
        "-m",
        "bitlm_dist",
        "train",
        str(tiny.file),
        "--run.dir",
        str(tmp_path / "run"),
    ]
    words = ["unshare", "--mount", "sh", "-c", script, "sh", *command, "--data.path", str(prepared)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if "Operation not permitted" in result.stderr:
        pytest.skip("needs the right to mount a tmpfs")

    assert result.returncode == 2, result.stderr
    expected = "bitlm: reading the data needs shared memory: /dev/shm cannot be written "
    expected += "(No space left on device): mount it larger"
    assert result.stderr.splitlines()[-1].startswith(expected)
    assert not (tmp_path / "run").exists()
