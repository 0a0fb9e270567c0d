import gzip
import json

import pytest
import zstandard
from bitlm_dist.data_prep.sources import documents, find_files

from bitlm_dist.errors import UserError

LINES = "".join(json.dumps({"text": f"line {i} ä"}) + "\n" for i in range(3)).encode()


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)])
def test_plain_and_compressed_lines(tmp_path, suffix, pack):
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(pack(LINES))
    assert list(documents(file)) == ["line 0 ä", "line 1 ä", "line 2 ä"]


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 \(byte 3 is 0xe9\): convert it"):
        list(documents(file))


@pytest.mark.parametrize("line", [b"{broken", b'{"body": "x"}', b"[1]", b'{"text": 5}', b'{"text": "\xff"}'])
def test_a_bad_line_is_named_with_its_number(tmp_path, line):
    file = tmp_path / "x.jsonl"
    file.write_bytes(LINES + line + b"\n")
    with pytest.raises(UserError, match=r"x.jsonl:4"):
        list(documents(file))


def test_sources_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(UserError, match="none.txt does not exist"):
        find_files([tmp_path / "none.txt"])
    (tmp_path / "x.pdf").write_text("")
    with pytest.raises(UserError, match="x.pdf is none of"):
        find_files([tmp_path / "x.pdf"])
    with pytest.raises(UserError, match="holds no .txt or .jsonl"):
        find_files([tmp_path])
