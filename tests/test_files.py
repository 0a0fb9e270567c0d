import errno
import os

import pytest
from matplotlib.figure import Figure

from bitlm_dist.errors import os_error_message
from bitlm_dist.files import write_atomically
from bitlm_dist.plots import save_plot


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(descriptor):
    raise KeyboardInterrupt


def test_a_file_that_cannot_be_written_leaves_the_old_one_alone(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_atomically(file, "old ±")
    assert file.read_bytes() == "old ±".encode()

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(file, "new")
    assert os_error_message(caught.value).startswith(f"{file}: no space left on device: make room")

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old ±"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "result").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_atomically(tmp_path / "result", "new")
    assert caught.value.filename == str(tmp_path / "result")
    assert list(tmp_path.iterdir()) == [tmp_path / "result"]


def test_half_a_plot_is_never_left(tmp_path, monkeypatch):
    figure = Figure()
    save_plot(figure, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_plot(figure, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "plot.svg"]
