import bz2
import csv
import io
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist.data_prep import decompression, json_values, sources
from bitlm_dist.data_prep.input_files import find_files
from bitlm_dist.data_prep.reading import ChunkReader
from bitlm_dist.data_prep.separators import split_documents
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.errors import UserError


def read(file, **options):
    """Read a file. Returns its texts, its first error, and the counts."""
    made = Settings(**options)
    reader = ChunkReader(made)
    batches = [
        reader.read_chunk(chunk)
        for chunk in sources.iter_chunks(find_files([file], Counter()), made)
    ]
    texts = [text.decode() for batch in batches for text in batch.texts]
    return (
        texts,
        next((batch.error for batch in batches if batch.error), None),
        sum((b.counts for b in batches), Counter()),
    )


def in_pieces(data, size):
    return (data[i : i + size] for i in range(0, len(data), size))


TEXTS = ["plain", 'with "quotes"', "a, comma", "two\nlines\r\nand more", "tab\there", "ä, 中文"]


@pytest.mark.parametrize(
    ("name", "delimiter"), [("x.csv", ","), ("x.TSV", "\t"), ("x.csv.bz2", ",")]
)
@pytest.mark.parametrize("size", [1, 40, 10**6])
def test_tables_of_text(tmp_path, name, delimiter, size, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", size)
    table = io.StringIO()
    rows = csv.writer(table, delimiter=delimiter)
    rows.writerow(["number", "text"])
    for number, text in enumerate(TEXTS):
        rows.writerow([number, text])
    data = b"\xef\xbb\xbf" + table.getvalue().encode() + b"\r\n\r\n"
    file = tmp_path / name
    file.write_bytes(bz2.compress(data) if name.endswith("bz2") else data)
    expected = [text.replace("\r\n", "\n") for text in TEXTS]
    texts, error, counts = read(file)
    assert (texts, error, counts["read"]) == (expected, None, len(TEXTS))
    assert read(file, field="number")[0] == list("012345")


def test_tables_that_do_not_fit_are_named(tmp_path):
    file = tmp_path / "x.csv"

    def refused(content, message, **options):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            read(file, **options)
        assert "\n" not in str(raised.value)

    refused(b"a,b\n1,2\n", r'x.csv has no column "text": choose one with --field \(a, b\)')
    refused(b"text,text\n1,2\n", 'x.csv has 2 columns "text"')
    refused(
        b'text,n\n"open,1\nmore,2\n', "x.csv:3 is no table that can be read: unexpected end of data"
    )
    refused(b'text,n\n"a"b,1\n', "x.csv:2 is no table that can be read: ',' expected after '\"'")
    refused(
        b"text,n\nfine,1\nan, unquoted comma,2\n",
        "x.csv:3 has 3 columns and its header 2: mend the line",
    )
    refused(
        b"text\n" + b"y" * 17_000_000,
        "x.csv has a line of more than 16,000,005 characters",
        max_chars=5,
    )
    file.write_bytes(b"text,n\nfine,1\nan, unquoted comma,2\n\xff,3\nlast,4\n")
    texts, error, counts = read(file, on_error="skip")
    assert (texts, error, counts["no_text"], counts["not_utf8"]) == (["fine", "last"], None, 1, 1)
    file.write_bytes(b"text,n\nfine,1\n\xff,3\n")
    assert read(file)[1].startswith(f"{file}: row:2 is not UTF-8")
    file.write_bytes(b"")
    assert read(file)[0] == []


@pytest.mark.parametrize("kind", ["list_", "large_list", "fixed"])
def test_lists_of_strings_in_parquet_are_one_document(tmp_path, kind):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kinds = {"list_": arrow.list_(arrow.string()), "large_list": arrow.large_list(arrow.string())}
    kinds["fixed"] = arrow.list_(arrow.string(), 2)
    column = arrow.array([["a", "b"], ["c", ""], None, ["d", None]], kinds[kind])
    parquet.write_table(arrow.table({"text": column}), tmp_path / "x.parquet")
    texts, _, counts = read(tmp_path / "x.parquet", on_error="skip")
    assert (texts, counts["no_text"], counts["read"]) == (["a\nb", "c\n"], 2, 4)


def test_nested_and_packed_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"b": {"c": f"row {i}"}, "n": i} for i in range(5)] + [None, {"b": None, "n": 1}]
    plain = io.BytesIO()
    parquet.write_table(arrow.table({"a": rows}), plain)
    (tmp_path / "x.parquet.bz2").write_bytes(bz2.compress(plain.getvalue()))
    texts, _, counts = read(tmp_path / "x.parquet.bz2", field="a.b.c", on_error="skip")
    assert (texts, counts["no_text"]) == ([f"row {i}" for i in range(5)], 2)
    for field, message in [
        ("a.x", 'has no column "a.x"'),
        ("a.b.c.d", "has no column"),
        ("a.b", "holds struct<c: string>"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path / "x.parquet.bz2", field=field)


DOCUMENTS = [
    {"text": f"value {i} ä\n", "more": [1, {"text": "no"}, "]}", 1e999]} for i in range(30)
]
SHAPES = {
    "array": json.dumps(DOCUMENTS),
    "array on lines": "[\n" + ",\n".join(map(json.dumps, DOCUMENTS)) + "\n]\n",
    "indented": json.dumps(DOCUMENTS, indent=2),
    "lines": "\n".join(map(json.dumps, DOCUMENTS)),
    "lines with blanks": "\n\n" + "\r\n".join(map(json.dumps, DOCUMENTS)) + "\r\n\r\n",
    "one behind the other": " ".join(map(json.dumps, DOCUMENTS)),
    "indented one by one": "\n".join(json.dumps(document, indent=1) for document in DOCUMENTS),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_files_of_every_shape(tmp_path, shape, bom, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 300)
    file = tmp_path / "x.json"
    file.write_bytes(bom + SHAPES[shape].encode())
    for piece in (7, 1 << 20):
        monkeypatch.setattr(decompression, "READ_BYTES", piece)
        texts, error, counts = read(file)
        assert (texts, error, counts["read"]) == (
            [document["text"] for document in DOCUMENTS],
            None,
            30,
        )


short = st.text('a"\\\n[]{},: \u2028ä\U0001f600', max_size=6)
json_objects = st.dictionaries(
    short, short | st.integers() | st.floats() | st.lists(short, max_size=3), max_size=3
)


@settings(max_examples=40)
@given(
    st.lists(json_objects, max_size=4),
    st.integers(1, 50),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_values_are_those_of_the_file(documents, size, ascii_only, indent):
    data = json.dumps(documents, ensure_ascii=ascii_only, indent=indent).encode()
    found = list(json_values.iter_values(in_pieces(data, size), "x", None))
    assert not any(b"\n" in value for value in found)
    assert json.dumps(list(map(json.loads, found))) == json.dumps(documents)


BROKEN = [
    (
        '[{"text": "a"},\n{"text": b}]',
        "x.json:2 is no JSON that can be read: Expecting value .column 10.",
    ),
    ('[{"text": "a"}, ', "x.json:1 .*the array does not end .column 17"),
    ('[{"text": "a"}', "x.json:1 .*the array does not end"),
    ('[{"text": "a"},]', "a value must follow the comma"),
    ('[{"text": "a"} {"text": "a"}]', "expected , or ]"),
    ('[{"text": "a"}] []', "something follows the array"),
    ('[{"text": "a', "Unterminated string"),
    ("[" + "[" * 100_000, "nested too deeply"),
    ('{"text":\n "a"} {', "x.json:2 is no JSON"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_json_file_that_is_broken_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.json", on_error="skip")


def test_other_faults_of_json_files(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('[{"text": "a"}, {"body": "b"}, 7]')
    assert read(file)[1].startswith(f'{file}: value:2 is a JSON object without a field "text"')
    assert read(file, on_error="skip")[2]["not_json"] == 1
    file.write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(UserError, match="x.json is not UTF-8"):
        read(file)
    long = json.dumps([{"text": "a"}, {"text": "b" * 1_000_000}])
    with pytest.raises(
        UserError, match="a value has more than 1,000 characters: raise --max-chars"
    ):
        list(json_values.iter_values(in_pieces(long.encode(), 1000), "x", 1000))


SEPARATORS = ["\n\n\n", "<|endoftext|>", "aa", "\r"]


@settings(max_examples=60)
@given(st.lists(st.text("ab<|\n\r ä", max_size=12)), st.sampled_from(SEPARATORS), st.integers(1, 9))
def test_documents_between_separators_do_not_depend_on_pieces(texts, separator, size):
    data = separator.join(texts).encode()
    found = [list(split_documents(separator, in_pieces(data, n), None)) for n in (size, 10**6)]
    assert found[0] == found[1]
    if "\r" not in data.decode():
        assert found[0] == [
            text.encode() for text in data.decode().split(separator) if text.strip()
        ]


def test_one_file_of_many_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 10)
    file = tmp_path / "x.txt"
    file.write_bytes(
        b"\xef\xbb\xbffirst\r\n\r\nsecond\n\n\r\n\n" + b"x" * 200 + b"\n\n\xff bad\n\nlast\n"
    )
    texts, error, counts = read(file, document_separator="\n\n", max_chars=20, on_error="skip")
    assert (texts, error) == (["first", "second", "last\n"], None)
    assert (counts["read"], counts["too_long"], counts["not_utf8"]) == (5, 1, 1)
    assert read(file, document_separator="\n\n", max_chars=20)[1].startswith(
        f"{file}: document:4 is not UTF-8"
    )


@pytest.mark.parametrize("size", [21, 1000])
def test_a_file_that_is_too_long_for_a_document_names_the_separator(tmp_path, size):
    file = tmp_path / "x.txt"
    file.write_text("y" * size)
    try:
        error = read(file, max_chars=20)[1]
    except UserError as raised:
        error = str(raised)
    assert error.startswith(
        f"{file} is one document of more than 20 characters (--max-chars): "
        r"cut it at its blank lines with --document-separator '\n\n', allow more (0: no limit)"
    )
    file.write_text("y" * 20 + "\x00" * 9)
    assert read(file, max_chars=20)[0] == ["y" * 20], "as long as any may be, once it is clean"
