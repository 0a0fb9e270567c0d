import bz2
import gzip
import json
import lzma
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import zstandard

from bitlm_dist.data_prep import input_files, sources
from bitlm_dist.data_prep.reading import ChunkReader
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import iter_chunks
from bitlm_dist.errors import UserError

LINES = "".join(json.dumps({"text": f"line {i} ä"}) + "\n" for i in range(3)).encode()
TEXTS = ["line 0 ä", "line 1 ä", "line 2 ä"]


def find_files(inputs):
    return input_files.find_files(inputs, Counter())


def read(*inputs, **settings):
    """Read inputs. Returns their documents, and the batches they came in."""
    made = Settings(**settings)
    reader = ChunkReader(made)
    batches = [reader.read_chunk(chunk) for chunk in iter_chunks(find_files(inputs), made)]
    return [text.decode() for batch in batches for text in batch.texts], batches


def packed(data):
    return zstandard.ZstdCompressor().compress(data)


def frames(data):
    return packed(data[:20]) + packed(b"") + packed(data[20:])


def streams(compress):
    return lambda data: compress(data[:20]) + compress(b"") + compress(data[20:])


PACKING = [
    ("", bytes),
    *((".gz", pack) for pack in (gzip.compress, streams(gzip.compress))),
    *((".bz2", pack) for pack in (bz2.compress, streams(bz2.compress))),
    *((".xz", pack) for pack in (lzma.compress, streams(lzma.compress))),
    *((".zst", pack) for pack in (packed, frames)),
]


@pytest.mark.parametrize(("suffix", "pack"), PACKING)
def test_plain_and_compressed_files(tmp_path, suffix, pack):
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(pack(b"\xef\xbb\xbf" + LINES + b"\n  \n"))
    assert read(file)[0] == TEXTS
    one = tmp_path / f"one.txt{suffix}"
    one.write_bytes(pack(b"\xef\xbb\xbfline 0\r\nends"))
    assert read(one)[0] == ["line 0\nends"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_is_cut_short_or_damaged_is_named(tmp_path, suffix):
    file = tmp_path / f"x.jsonl{suffix}"
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": packed}[
        suffix
    ]
    whole = pack(LINES * 100)
    for content in (
        whole[: len(whole) // 2],
        whole[:-1],
        b"\x00" * 50,
        b"",
        whole + b"\x01" + whole[1:],
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"x.jsonl{suffix} (is|cannot be read)"):
            read(file)


def test_folders_are_searched_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "a.jsonl", "b/1.txt.gz", "c.md"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        content = LINES if name.endswith("l") else name.encode()
        file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [file.name for file in find_files([tmp_path])] == ["a.jsonl", "b/1.txt.gz", "b/2.txt"]
    texts, batches = read(tmp_path, tmp_path / "b")
    assert texts == [*TEXTS, "b/1.txt.gz", "b/2.txt", "b/1.txt.gz", "b/2.txt"]
    assert [batch.source_index for batch in batches] == [0, 0, 1]
    assert batches[-1].corpus_offset == sum(
        file.size for file in find_files([tmp_path, tmp_path / "b"])
    )


def test_sources_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(UserError, match="none.txt does not exist"):
        find_files([tmp_path / "none.txt"])
    (tmp_path / "x.pdf").write_text("")
    with pytest.raises(UserError, match="x.pdf is none of"):
        find_files([tmp_path / "x.pdf"])
    with pytest.raises(
        UserError, match=r"holds no .txt, .jsonl, .*or .parquet file .*\(1 file left out: 1 .pdf\)"
    ):
        find_files([tmp_path])


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_chunks_cut_lines_anywhere_and_lose_none(tmp_path, monkeypatch, size):
    monkeypatch.setattr(sources, "CHUNK_BYTES", size)
    monkeypatch.setattr(sources.decompression, "READ_BYTES", 11)
    file = tmp_path / "x.jsonl"
    file.write_bytes(LINES * 5 + b'{"text": "no line end"}')
    found = list(iter_chunks(find_files([file]), Settings()))
    assert b"".join(chunk.data for chunk in found) == file.read_bytes()
    assert [chunk.first_number for chunk in found] == [
        1 + file.read_bytes()[: sum(map(len, before))].count(b"\n") for before in heads(found)
    ]
    assert read(file)[0] == TEXTS * 5 + ["no line end"]


def heads(found):
    return [[chunk.data for chunk in found[:i]] for i in range(len(found))]


def test_a_line_too_long_for_any_document_is_passed_over_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 20)
    monkeypatch.setattr(sources, "LINE_BYTES", 100)
    monkeypatch.setattr(sources.decompression, "READ_BYTES", 16)
    file = tmp_path / "x.jsonl"
    long = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    file.write_bytes(LINES + long + LINES + long + b"{bad\n" + LINES + long.rstrip())

    texts, batches = read(file, max_chars=20, on_error="skip")
    assert texts == TEXTS * 3
    assert sum(batch.counts["too_long"] for batch in batches) == 3
    assert sum(batch.counts["read"] for batch in batches) == 13
    assert (
        max(len(chunk.data) for chunk in iter_chunks(find_files([file]), Settings(max_chars=20)))
        < 400
    )
    assert next(batch.error for batch in read(file, max_chars=20)[1] if batch.error).startswith(
        f"{file}:9 "
    )

    (tmp_path / "x.txt").write_text("y" * 1000)
    texts, batches = read(tmp_path / "x.txt", max_chars=20, on_error="skip")
    assert (texts, batches[0].counts["too_long"], batches[0].counts["read"]) == ([], 1, 1)


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_columns(tmp_path, kind, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(sources, "CHUNK_BYTES", 60)
    file = tmp_path / "x.parquet"
    kinds = {
        "string": arrow.string(),
        "large_string": arrow.large_string(),
        "dictionary": arrow.string(),
    }
    column = arrow.array([f"row {i} ä" for i in range(50)] + [None], kinds[kind])
    if kind == "dictionary":
        column = column.dictionary_encode()
    parquet.write_table(
        arrow.table({"content": column, "number": list(range(51))}), file, row_group_size=20
    )

    texts, batches = read(file, field="content", on_error="skip")
    assert texts == [f"row {i} ä" for i in range(50)]
    assert len(batches) > 5
    assert sum(batch.counts["no_text"] for batch in batches) == 1
    assert read(file, field="content")[1][-1].error.startswith(f"{file}: row:51 is null")
    with pytest.raises(
        UserError,
        match=r'x.parquet has no column "text": choose one with --field \(content, number\)',
    ):
        read(file)
    with pytest.raises(UserError, match='the column "number" holds int64, expected strings'):
        read(file, field="number")

    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="x.parquet is no Parquet file"):
        read(file, field="content")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'bitlm-dist\[parquet\]'"):
        read(tmp_path / "x.parquet")


def test_urls_are_read_through_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe(
        {
            "/corpus/b.jsonl.gz": gzip.compress(LINES),
            "/corpus/deep/a.txt": b"remote text",
            "/corpus/x.md": b"",
        }
    )
    try:
        assert read("memory://corpus")[0] == [*TEXTS, "remote text"]
        assert [file.name for file in find_files(["memory://corpus"])] == [
            "b.jsonl.gz",
            "deep/a.txt",
        ]
        assert read("memory://corpus/deep/a.txt")[0] == ["remote text"]
        with pytest.raises(UserError, match="memory://corpus/none.txt does not exist"):
            find_files(["memory://corpus/none.txt"])
        with pytest.raises(UserError, match="memory://nowhere"):
            find_files(["memory://nowhere"])
    finally:
        memory.rm("/corpus", recursive=True)

    with pytest.raises(UserError, match=r"^nonesuch://x/y.txt: there is no protocol nonesuch://"):
        find_files(["nonesuch://x/y.txt"])


def test_text_comes_from_a_web_server(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(LINES)
    handler = partial(
        type("Silent", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}),
        directory=str(tmp_path),
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert read(f"http://127.0.0.1:{server.server_port}/x.jsonl")[0] == TEXTS
        url = f"http://127.0.0.1:{server.server_port}/x.jsonl?key=secret"
        assert read(url)[0] == TEXTS
        assert [file.name for file in find_files([url])] == ["x.jsonl"]
        assert "secret" not in read(url, field="body")[1][0].error
        with pytest.raises(UserError, match="/none.jsonl does not exist"):
            find_files([f"http://127.0.0.1:{server.server_port}/none.jsonl"])
    finally:
        server.shutdown()
        server.server_close()
