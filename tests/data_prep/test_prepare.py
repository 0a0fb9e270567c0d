import base64
import bz2
import errno
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import zstandard

from bitlm_dist.data import vocabulary
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.shards import DocumentShards
from bitlm_dist.data_prep import corpus_statistics, output_dir, output_units, sources
from bitlm_dist.data_prep.prepare import prepare
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.errors import UserError

pytestmark = pytest.mark.integration

SMALL = 3000  # bytes per unit and per chunk


def tree(folder: Path):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def texts_of(corpus):
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def texts_in(prepared, splits=("train", "validation")):
    tokenizer = Tokenizer.from_folder(prepared / "tokenizer")
    found = []
    for split in splits:
        with DocumentShards(prepared, split) as shards:
            found += [
                tokenizer.decode(shards.tokens(i).tolist())
                for i in range(len(shards.document_lengths))
            ]
    return found


@pytest.fixture
def small(monkeypatch):
    """Make many units and chunks from little text."""
    monkeypatch.setattr(output_units, "MEGABYTE", SMALL // 2)
    monkeypatch.setattr(sources, "CHUNK_BYTES", SMALL)
    monkeypatch.setattr(corpus_statistics, "TOKENS_PER_COUNT_TASK", SMALL)


def write_lines(file, texts):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def messy(corpus, tmp_path_factory):
    """A folder of files with copies, near copies, bad lines and text to clean."""
    rng = random.Random(5)
    root = tmp_path_factory.mktemp("messy")
    texts = texts_of(corpus)
    near = [text.replace(".", " and more.") for text in texts[20:30]]
    write_lines(root / "a.jsonl", texts[:90] + texts[:10] + near)
    rest = [*texts[60:], "", "  ", "x", "line\r\nends\x07 here é", *texts[150:170]]
    rng.shuffle(rest)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rest) + '{broken\n{"body": 1}\n'
    (root / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    for i in range(5):
        (root / f"c{i}.txt").write_text(f"text number {i} of a file of its own\n" * 40)
    return root


MESSY = Settings(min_chars=2, near_dedup=0.8, on_error="skip")


def test_nothing_is_lost(corpus, prepared):
    assert sorted(texts_in(prepared)) == sorted(texts_of(corpus))
    manifest = read_manifest(prepared)
    assert sum(s["bytes"] for s in manifest["splits"].values()) == sum(
        len(t.encode()) for t in texts_of(corpus)
    )
    assert manifest["splits"]["validation"]["documents"] > 5
    assert manifest["files"] == output_dir.file_hashes(prepared)
    assert len(manifest["files"]) == 6
    assert output_dir.STATISTICS_FILE == vocabulary.STATISTICS_FILE


def test_statistics_are_those_of_the_training_split(prepared):
    statistics = np.load(prepared / "statistics.npz")
    with DocumentShards(prepared, "train") as shards:
        tokens = np.concatenate([shards.tokens(i) for i in range(len(shards.document_lengths))])
    assert np.array_equal(statistics["counts"], np.bincount(tokens, minlength=300))
    assert (
        statistics["byte_lengths"][tokens].sum()
        == read_manifest(prepared)["splits"]["train"]["bytes"]
    )


def test_documents_stay_or_are_counted_with_a_reason(messy, tmp_path, small):
    pytest.importorskip("rensa")
    report = prepare([messy / "a.jsonl", messy], "bpe:300", tmp_path / "out", 0.0, MESSY)
    kept = texts_in(tmp_path / "out", ["train"])
    assert len(kept) == len(set(kept)) == report.documents
    assert report.documents_read == report.documents + sum(report.dropped.values())
    assert "line\nends here é" in kept
    manifest = read_manifest(tmp_path / "out")

    first, second = manifest["sources"]
    assert (first["name"], second["name"]) == ("a.jsonl", messy.name)
    assert first["dropped"]["duplicate"] == 10
    assert second["dropped"]["duplicate"] > 110, "all of a.jsonl again"
    assert {k: report.dropped[k] for k in ("not_json", "no_text", "empty", "too_short")} == {
        "not_json": 1,
        "no_text": 1,
        "empty": 2,
        "too_short": 1,
    }
    assert manifest["documents"]["changed"] == {
        "line_ends": 1,
        "control_characters": 1,
        "normalized": 1,
    }

    page = (tmp_path / "out" / "report.md").read_text()
    assert "| a.jsonl | 110 |" in page
    assert "| copy of an earlier document |" in page
    assert len(page.splitlines()) < 60

    everything = prepare(
        [messy / "a.jsonl"],
        "bpe:300",
        tmp_path / "all",
        0.0,
        Settings(exact_dedup=False, on_error="skip"),
    )
    assert everything.documents == 110


def test_the_tree_knows_neither_workers_nor_folders(messy, tmp_path, small, monkeypatch):
    pytest.importorskip("rensa")
    trees = []
    for workers, place in ((1, "one"), (2, "somewhere/two"), (3, "three")):
        monkeypatch.setattr(
            corpus_statistics,
            "TOKENS_PER_COUNT_TASK",
            SMALL if workers > 1 else 10**6,
        )
        copy = tmp_path / place / messy.name
        copy.mkdir(parents=True)
        for file in messy.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        report = prepare(
            [copy], "bpe:300", tmp_path / place / "out", 0.1, MESSY, num_workers=workers
        )
        assert (report.workers, report.units > 10) == (workers, True)
        trees.append(tree(tmp_path / place / "out"))
    assert trees[0] == trees[1] == trees[2]


SCRIPT = """
import sys
from pathlib import Path
from bitlm_dist.data_prep import sources, output_units
from bitlm_dist.data_prep.prepare import prepare
from bitlm_dist.data_prep.settings import Settings
output_units.MEGABYTE = 1500
sources.CHUNK_BYTES = 3000
settings = Settings(min_chars=2, near_dedup=0.8, on_error="skip")
source, out, workers = sys.argv[1:]
prepare([Path(source)], "bpe:300", Path(out), 0.1, settings, num_workers=int(workers))
"""


def start(corpus, out, workers, place):
    environment = {**os.environ, "TMPDIR": str(place)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(corpus), str(out), str(workers)],
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        # A background job of a shell ignores SIGINT by default.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def units_there(out):
    return len(list(out.glob("units/*-*.json")))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("workers", "kills"),
    [
        (2, 2),
        pytest.param(1, 2, marks=pytest.mark.slow),
        *(pytest.param(n, 10, marks=pytest.mark.long) for n in (1, 2)),
    ],
)
def test_killed_at_random_moments_and_rerun_gives_the_same_tree(
    messy, tmp_path, small, seed, workers, kills
):
    pytest.importorskip("rensa")
    rng = random.Random(seed)
    whole = tmp_path / "whole"
    out = tmp_path / "killed"
    began = time.monotonic()
    assert start(messy, whole, workers, tmp_path).wait() == 0
    took = time.monotonic() - began

    records = []
    for kill in range(kills):
        # All units are written, so there is nothing left to interrupt.
        if units_there(out) == units_there(whole):
            shutil.rmtree(out)
            records.append(0)

        process = start(messy, out, workers, tmp_path)
        if kill % 4 == 3:
            time.sleep(rng.uniform(0, took))
        else:
            # Most of the time goes into imports and training the tokenizer, so wait for a new unit.
            deadline = time.monotonic() + 60
            while (
                units_there(out) <= sum(records[-1:])
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))

        # Only the leading process, whose workers must follow, or all of them.
        if kill % 2:
            process.kill()
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        records.append(units_there(out))

    again = prepare([messy], "bpe:300", out, 0.1, MESSY, num_workers=workers)
    assert again.units_reused >= records[-1] * (again.units_reused > 0)
    print("units there after each kill:", *records)
    assert tree(out) == tree(whole)
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("units_before_kill", [1, 5])
def test_finished_units_are_not_written_again(messy, tmp_path, small, units_before_kill):
    pytest.importorskip("rensa")
    out = tmp_path / "out"
    process = start(messy, out, 2, tmp_path)
    deadline = time.monotonic() + 120
    while len(list(out.glob("units/*-*.json"))) < units_before_kill and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in out.glob("units/*-*.json")}
    assert len(before) >= units_before_kill
    assert prepare([messy], "bpe:300", out, 0.1, MESSY).units_reused == len(before)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_workers_die_with_their_leader(messy, tmp_path):
    process = start(messy, tmp_path / "out", 2, tmp_path)
    children = []
    while len(children) < 2 and process.poll() is None:
        children = psutil.Process(process.pid).children()
    # The workers, and perhaps already the process that trains the tokenizer.
    assert len(children) >= 2
    time.sleep(0.3)
    process.kill()
    process.wait()

    # A worker that is just starting notices late on a busy machine.
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_ctrl_c_ends_everything(messy, tmp_path):
    process = start(messy, tmp_path / "out", 2, tmp_path)
    children = []
    while len(children) < 2 and process.poll() is None:
        children = psutil.Process(process.pid).children()

    # The workers are still starting, so no task can be done yet.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) != 0
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_a_worker_that_is_killed_ends_the_preparation_with_a_line(
    messy, tmp_path, small, monkeypatch
):
    from bitlm_dist.data_prep import pool

    before = psutil.Process().children()
    plain = pool._Process.request

    def request(self, task):
        self._process.kill()
        return plain(self, task)

    monkeypatch.setattr(pool._Process, "request", request)
    with pytest.raises(
        UserError, match="a worker process ended with code -9 .*run the same command again"
    ):
        prepare([messy], "bpe:300", tmp_path / "out", settings=MESSY, num_workers=2)
    assert psutil.Process().children() == before


def test_a_rerun_writes_nothing(corpus, prepared):
    before = {
        p: p.stat().st_mtime_ns
        for p in prepared.rglob("*")
        if p.suffix in (".zstd", ".npz", ".npy") and p.parent != prepared
    }
    report = prepare([corpus], "bpe:300", prepared, 0.1)
    assert report.units_reused == report.units
    after = {p: p.stat().st_mtime_ns for p in before}
    assert {p for p in before if before[p] != after[p]} <= {
        prepared / s / "lengths.npy" for s in ("train", "validation")
    }


def fail(*_):
    raise RuntimeError("killed here")


def test_units_of_text_that_changed_are_replaced(tmp_path, small):
    texts = [f"document {i} is about {i * i}. " * 10 for i in range(60)]
    file = write_lines(tmp_path / "x.jsonl", texts)
    report = prepare([file], "bpe:300", tmp_path / "out", 0.0)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())

    write_lines(file, [*texts[:40], *(text.upper() for text in texts[40:])])
    again = prepare([file], "bpe:300", tmp_path / "out", 0.0)
    assert 0 < again.units_reused < report.units
    assert len(list((tmp_path / "out/units").iterdir())) == again.units
    assert (
        len([path for path in (tmp_path / "out/train").iterdir() if path.is_dir()]) == again.units
    )
    assert sum(text.isupper() for text in texts_in(tmp_path / "out", ["train"])) == 20
    assert settings == json.loads((tmp_path / "out" / "settings.json").read_text())

    write_lines(file, texts[:40])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed here"):
        patch.setattr(output_dir, "merge_units", fail)
        prepare([file], "bpe:300", tmp_path / "out", 0.0)
    with pytest.raises(UserError, match="is not finished"):
        read_manifest(tmp_path / "out")
    prepare([file], "bpe:300", tmp_path / "out", 0.0)
    assert texts_in(tmp_path / "out", ["train"]) == texts[:40]


def test_an_output_folder_of_other_origin_is_refused_and_kept(corpus, prepared, tmp_path):
    before = tree(prepared)
    for name, arguments in [
        ("tokenizer", {"tokenizer": "bpe:400"}),
        ("validation", {"validation_fraction": 0.2}),
        ("min_chars", {"settings": Settings(min_chars=5)}),
        ("near_dedup", {"settings": Settings(near_dedup=0.7)}),
        ("on_error", {"settings": Settings(on_error="skip")}),
    ]:
        with pytest.raises(
            UserError, match=f"was prepared with another {name}: choose another --out"
        ):
            prepare(
                [corpus],
                **{
                    "tokenizer": "bpe:300",
                    "out": prepared,
                    "validation_fraction": 0.1,
                    **arguments,
                },
            )
    with pytest.raises(UserError, match="prepared with another inputs"):
        prepare([write_lines(tmp_path / "y.jsonl", ["z"])], "bpe:300", prepared, 0.1)
    assert tree(prepared) == before

    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="was not written by `bitlm prep`"):
        prepare([corpus], "bpe:300", other, 0.1)
    assert tree(other) == {"thesis.txt": b"do not touch"}
    (other / "settings.json").write_text('{"theme": "dark"}')
    with pytest.raises(UserError, match="was not written by `bitlm prep`"):
        prepare([corpus], "bpe:300", other, 0.1)

    with (
        output_dir._locked(prepared),
        pytest.raises(UserError, match="is being prepared by another process"),
    ):
        prepare([corpus], "bpe:300", prepared, 0.1)


BAD = [
    (b"caf\xe9", "bpe:300", "text.txt is not UTF-8"),
    (b" \n", "bpe:300", "no document is left; dropped: 1 empty"),
    (b"fine", "bpe:100", "bpe:SIZE with a size of at least 258"),
    (b"fine", "bpe:many", "bpe:SIZE with a size of at least 258"),
    (b"fine", "none.json", "tokenizer none.json does not exist"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("content", "tokenizer", "message"), BAD)
def test_bad_input_that_comes_before_the_first_unit_leaves_nothing(
    tmp_path, content, tokenizer, message, workers, monkeypatch
):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        prepare([tmp_path / "text.txt"], tokenizer, tmp_path / "out", num_workers=workers)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_line_stops_with_its_place_and_the_command_goes_on_when_it_is_mended(
    tmp_path, corpus, small
):
    tokenizer = tmp_path / "tokenizer.json"
    prepare([corpus], "bpe:300", tmp_path / "other", 0.1)
    tokenizer.write_bytes((tmp_path / "other/tokenizer/tokenizer.json").read_bytes())

    lines = corpus.read_text().splitlines()
    file = tmp_path / "x.jsonl"
    out = tmp_path / "out"
    whole = tmp_path / "whole"
    file.write_text("\n".join([*lines[:150], "{broken", *lines[150:]]))
    for workers in (1, 2):
        with pytest.raises(
            UserError,
            match=r"x.jsonl:151 is no JSON object \(.*\): mend the line; or .*--on-error skip",
        ):
            prepare([file], str(tokenizer), out, 0.1, num_workers=workers)
        with pytest.raises(UserError, match="is not finished"):
            read_manifest(out)

    written = len(list((out / "units").iterdir()))
    assert written > 3
    file.write_text("\n".join(lines))
    assert prepare([file], str(tokenizer), out, 0.1).units_reused >= written - 1
    prepare([file], str(tokenizer), whole, 0.1)
    assert tree(out) == tree(whole)


@pytest.fixture
def byte_tokenizer(tmp_path):
    """A tokenizer of the 256 bytes, which needs no training."""
    file = tmp_path / "bytes.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    return str(file)


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=False
    ).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_command_goes_on_from_there(
    small_disk, tmp_path, small, byte_tokenizer, workers, seed
):
    rng = random.Random(seed)
    file = write_lines(
        tmp_path / "x.jsonl",
        ["".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(400)) for _ in range(900)],
    )
    out = small_disk / "out"
    with pytest.raises(
        UserError, match=r"out: the disk is full: make room and run the same command again"
    ) as raised:
        prepare([file], byte_tokenizer, out, 0.1, num_workers=workers)
    assert "\n" not in str(raised.value)
    done = len(list((out / "units").glob("*-*.json")))
    assert done > 5
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = prepare([file], byte_tokenizer, out, 0.1, num_workers=workers)
    assert again.units_reused == done
    prepare([file], byte_tokenizer, tmp_path / "whole", 0.1)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_named(corpus, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system", "x")

    monkeypatch.setattr(output_dir, "write_atomically", refuse)
    with pytest.raises(UserError, match="^x: read-only file system: choose a path"):
        prepare([corpus], "bpe:300", tmp_path / "out")


def test_a_folder_of_text_files_is_read_in_order(tmp_path):
    source = tmp_path / "texts"
    source.mkdir()
    for i in range(30):
        (source / f"{i:02d}.txt").write_text(f"document number {i} says hello\n" * 3)
    out = tmp_path / "out"
    assert prepare([source], "bpe:260", out, 0.0).documents == 30
    with DocumentShards(out, "train") as shards:
        tokenizer = Tokenizer.from_folder(out / "tokenizer")
        for i in (0, 29):
            assert tokenizer.decode(shards.tokens(i).tolist()).startswith(f"document number {i} ")
    with pytest.raises(UserError, match="has no validation split"):
        DocumentShards(out, "validation")
    with pytest.raises(UserError, match="every document fell into the validation split"):
        prepare([source], "bpe:260", tmp_path / "all", 1 - 1e-12)


def test_a_lone_document_gives_its_end_as_validation(tmp_path, corpus, byte_tokenizer):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(texts_of(corpus)[:60]))
    said = []
    report = prepare([file], byte_tokenizer, tmp_path / "out", notify=said.append)
    train, validation = (texts_in(tmp_path / "out", [split]) for split in ("train", "validation"))
    assert train[0] + validation[0] == file.read_text()
    assert train[0].endswith("\n\n")
    assert 0.02 < len(validation[0]) / len(file.read_text()) < 0.08
    (line,) = said
    assert line.startswith("the corpus is one document: its last ")
    assert line[1:] in (tmp_path / "out/report.md").read_text()
    assert report.documents == 1
    assert prepare([file], byte_tokenizer, tmp_path / "out").units_reused == 1
    prepare([file], byte_tokenizer, tmp_path / "none", 0.0, notify=said.append)
    assert texts_in(tmp_path / "none", ["train"]) == [file.read_text()]
    assert len(said) == 1
    (tmp_path / "few.txt").write_text("few")
    prepare([tmp_path / "few.txt"], byte_tokenizer, tmp_path / "few", 0.05, notify=said.append)
    assert "too short to hold out" in said[-1]


@pytest.fixture
def mixed(corpus, tmp_path):
    """A folder with a file of each format, and files of other kinds."""
    texts = [text for text in texts_of(corpus) if '"' not in text]
    root = tmp_path / "mixed"
    write_lines(root / "a.jsonl", texts[:20])
    (root / "b.json").write_text(json.dumps([{"text": text} for text in texts[20:40]], indent=1))
    (root / "c.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts[40:60]))
    (root / "d.txt.xz").write_bytes(lzma.compress("\n%%\n".join(texts[60:80]).encode()))
    (root / "e.NDJSON.bz2").write_bytes(
        bz2.compress(write_lines(tmp_path / "e", texts[80:100]).read_bytes())
    )
    for name in ("notes.pdf", "notes.PDF", ".hidden.txt"):
        (root / name).write_text("not read")
    return root, texts[:100]


def test_kinds_of_files_mix_and_a_killed_preparation_goes_on_to_the_same_bytes(
    mixed, tmp_path, small, byte_tokenizer, monkeypatch
):
    root, texts = mixed
    settings = Settings(document_separator="\n%%\n")
    said = []
    report = prepare([root], byte_tokenizer, tmp_path / "whole", 0.1, settings, notify=said.append)
    assert sorted(texts_in(tmp_path / "whole")) == sorted(texts)
    assert said == ["3 files left out: 2 .pdf, 1 hidden"]
    assert (
        report.left_out == read_manifest(tmp_path / "whole")["left_out"] == {".pdf": 2, "hidden": 1}
    )
    assert "3 files left out: 2 .pdf, 1 hidden.\n" in (tmp_path / "whole/report.md").read_text()

    plain = output_units.write_unit
    written = []

    def write_unit(unit, *arguments):
        if len(written) == 5:
            fail()
        written.append(unit.name)
        return plain(unit, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed here"):
        patch.setattr(output_units, "write_unit", write_unit)
        prepare([root], byte_tokenizer, tmp_path / "killed", 0.1, settings)
    assert prepare([root], byte_tokenizer, tmp_path / "killed", 0.1, settings).units_reused == 5
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    with pytest.raises(UserError, match="was prepared with another document_separator"):
        prepare([root], byte_tokenizer, tmp_path / "whole", 0.1)


def test_a_folder_begun_before_later_settings_goes_on(corpus, tmp_path, byte_tokenizer):
    out = tmp_path / "out"
    prepare([corpus], byte_tokenizer, out, 0.1)
    assert not {"document_separator", "max_unpack_ratio"} & set(
        json.loads((out / "settings.json").read_text())
    )
    again = prepare([corpus], byte_tokenizer, out, 0.1, Settings(max_unpack_ratio=5))
    assert again.units_reused == again.units


def test_progress_reaches_the_end(messy, tmp_path, small):
    pytest.importorskip("rensa")
    seen = []
    report = prepare([messy], "bpe:300", tmp_path / "out", 0.1, MESSY, on_progress=seen.append)
    phases = ["reading", "training bpe:300", "tokenizing", "finishing"]
    assert list(dict.fromkeys(p.phase for p in seen)) == phases

    total = sum(file.stat().st_size for file in messy.iterdir())
    for phase in ("reading", "tokenizing"):
        first, *_, last = done = [p for p in seen if p.phase == phase]
        assert (first.done, first.num_documents, first.total) == (0, 0, total)
        assert (last.done, last.num_documents) == (total, report.documents_read)
        assert [p.done for p in done] == sorted(p.done for p in done)
        assert len(done) > 3
    # a unit is done when it was written, not when its text was read
    assert sum(p.phase == "tokenizing" for p in seen) >= report.units
    assert {"parse", "clean", "tokenize", "write", "statistics", "all"} <= set(report.cpu_seconds)
    assert report.peak_memory_bytes > 10e6


def test_a_folder_of_another_version_is_refused(prepared, tmp_path):
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(
        UserError, match="has version 1, this bitlm reads 2: prepare the data again"
    ):
        read_manifest(tmp_path)


def test_neither_the_command_nor_a_worker_imports_torch():
    """Importing torch takes seconds and hundreds of megabytes per process."""
    modules = ("cli", "cli.progress", "cli.prep_progress", "data_prep.prepare", "data_prep.worker")
    names = ", ".join(f"bitlm_dist.{module}" for module in modules)
    code = (
        f"import sys, {names}; print(*{{'torch', 'streaming', 'transformers'}} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        == "\n"
    )
