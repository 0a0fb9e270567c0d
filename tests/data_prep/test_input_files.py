import os
from collections import Counter

import fsspec
import pytest

from bitlm_dist.data_prep.input_files import find_files, left_out_summary
from bitlm_dist.errors import UserError


def found(*inputs):
    left_out = Counter()
    return [file.name for file in find_files(inputs, left_out)], dict(left_out)


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


def test_every_kind_is_found_in_any_case_and_the_rest_is_counted(tmp_path):
    kinds = ["a.txt", "b.jsonl", "c.ndjson", "d.json", "e.csv", "f.tsv", "g.parquet"]
    names = [
        *kinds,
        "H.JSONL",
        "i.json.gz",
        "j.Txt.BZ2",
        "k.csv.xz",
        "l.parquet.zst",
        "m.2024.01.jsonl",
        "sub/n.txt",
    ]
    make(
        tmp_path,
        *names,
        "x.pdf",
        "y.PDF",
        "z.tar.gz",
        "README",
        ".hidden.txt",
        ".git/o.txt",
        "sub/.ipynb_checkpoints/n.txt",
    )
    os.mkfifo(tmp_path / "pipe.txt")

    expected = {
        ".pdf": 2,
        ".tar.gz": 1,
        "without a suffix": 1,
        "hidden": 1,
        "hidden folder": 2,
        "no regular file": 1,
    }
    assert found(tmp_path) == (sorted(names), expected)
    assert left_out_summary(Counter(expected)) == (
        "8 files left out: 2 .pdf, 2 hidden folders, 1 .tar.gz, 1 hidden, "
        "1 no regular file, 1 without a suffix"
    )
    assert left_out_summary(Counter({f".{i}": 1 for i in range(20)})).endswith(
        " 1 .14, 1 .15, 12 of other kinds"
    )
    assert left_out_summary(Counter()) == ""


def test_an_argument_itself_may_be_hidden(tmp_path):
    make(tmp_path, ".cache/a.txt", ".b.txt")
    assert found(tmp_path / ".cache", tmp_path / ".b.txt") == (["a.txt", ".b.txt"], {})


def test_links_are_followed_and_each_target_is_read_once(tmp_path):
    make(
        tmp_path,
        "in/real.txt",
        "in/deep/inner.txt",
        "out/far.txt",
        "out/deep/deeper.txt",
        "one.txt",
        "blobs/4f2e",
    )
    links = {
        "in/alias.txt": "real.txt",  # what is read anyway
        "in/again": "deep",
        "in/loop": ".",
        "in/deep/up": "../..",
        "in/far": "../out",
        "in/farther": "../out",
        "in/zone.txt": "../out/far.txt",
        "in/one.txt": "../one.txt",
        "in/blob.jsonl": "../blobs/4f2e",  # as in Hugging Face's cache: the link has the name
        "out/back": "../in",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)

    names, left_out = found(tmp_path / "in")
    assert names == [
        "blob.jsonl",
        "deep/inner.txt",
        "far/deep/deeper.txt",
        "far/far.txt",
        "one.txt",
        "real.txt",
    ]

    assert left_out == {"link to what is read anyway": 5, "link to a folder above it": 2}
    assert found(tmp_path / "in", tmp_path / "in/real.txt")[0][-1] == "real.txt", (
        "what is named twice is meant twice"
    )


@pytest.mark.parametrize("target", ["nowhere.jsonl", "gone.jsonl"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, target):
    make(tmp_path, "real.txt")
    (tmp_path / "gone.jsonl").symlink_to(target)
    for place in (tmp_path, tmp_path / "gone.jsonl"):
        with pytest.raises(
            UserError, match=f"{tmp_path}/gone.jsonl is a link to {target}, which cannot be reached"
        ):
            find_files([place], Counter())


def test_a_folder_that_cannot_be_searched_is_named(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "sub/b.txt")
    plain = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return plain(path)

    # Replaced, because root may search any folder.
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="sub cannot be searched: Permission denied"):
        find_files([tmp_path], Counter())


def test_left_out_files_of_a_store_are_counted():
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/left/{name}": b"x" for name in ("a.JSONL", "b.md", ".c/d.txt", ".e.txt")})
    try:
        assert found("memory://left") == (["a.JSONL"], {".md": 1, "hidden": 2})
    finally:
        memory.rm("/left", recursive=True)
