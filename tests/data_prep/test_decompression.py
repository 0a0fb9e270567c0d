import bz2
import gzip
import io
import lzma

import pytest
import zstandard

from bitlm_dist.data_prep import decompression
from bitlm_dist.data_prep.filters import DecontaminationFilter
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.errors import UserError

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_that_unpacks_without_end_is_refused(suffix, monkeypatch):
    size = 2_000_000
    bomb = PACK[suffix](bytes(size))

    def unpack(ratio=200):
        return sum(
            map(
                len,
                decompression.decompressed_blocks(
                    io.BytesIO(bomb), f"x.txt{suffix.upper()}", ratio
                ),
            )
        )

    assert unpack() == size, "a small file may be as regular as it likes"
    monkeypatch.setattr(decompression, "BOMB_BYTES", 500_000)
    assert size > 200 * len(bomb)
    with pytest.raises(
        UserError,
        match=rf"x.txt{suffix.upper()} unpacks to more than 200 times its size "
        ".*--max-unpack-ratio",
    ):
        unpack()
    assert unpack(0) == unpack(10**6) == size


@pytest.mark.parametrize("suffix", PACK)
def test_no_step_unpacks_much(suffix):
    size = 160_000_000 if suffix == ".zst" else 4_000_000
    bomb = PACK[suffix](bytes(size))
    steps = [
        len(piece) for piece in decompression.decompressed_blocks(io.BytesIO(bomb), f"x{suffix}", 0)
    ]
    assert sum(steps) == size
    assert max(steps) <= (135_000_000 if suffix == ".zst" else decompression.READ_BYTES)


def test_padding_between_xz_streams_is_none():
    data = lzma.compress(b"one ") + bytes(8) + lzma.compress(b"two") + bytes(4)
    assert b"".join(decompression.decompressed_blocks(io.BytesIO(data), "x.xz")) == b"one two"


def test_a_python_without_a_module_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lzma", None)
    with pytest.raises(
        UserError, match="x.xz: this Python was built without lzma: unpack the file first"
    ):
        list(decompression.decompressed_blocks(io.BytesIO(b"x"), "x.xz"))


def test_evaluation_text_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(decompression, "BOMB_BYTES", 1_000_000)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b" word" * 300_000))
    with pytest.raises(UserError, match="x.txt.gz unpacks to more than"):
        DecontaminationFilter([tmp_path / "x.txt.gz"], 0.1)


def test_settings_that_do_not_fit_are_named_and_bounds_are_not_recorded():
    with pytest.raises(UserError, match="--max-unpack-ratio -1: expected 1 or more, or 0"):
        Settings(max_unpack_ratio=-1).check()
    with pytest.raises(UserError, match="--document-separator is empty"):
        Settings(document_separator="").check()
    assert Settings(max_unpack_ratio=7).to_dict() == Settings().to_dict()
    assert Settings(document_separator="\n\n").to_dict() != Settings().to_dict()
