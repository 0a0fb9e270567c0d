import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bitlm_dist.data_prep import prepare as module
from bitlm_dist.data_prep.prepare import prepare
from bitlm_dist.data_prep.tokenizer import Tokenizer

from bitlm_dist.data.shards import Shards, read_manifest
from bitlm_dist.errors import UserError


def tree(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts_of(corpus):
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def test_nothing_is_lost(corpus, prepared):
    tokenizer = Tokenizer.of_folder(prepared / "tokenizer")
    found = []
    for split in ("train", "validation"):
        with Shards(prepared, split) as shards:
            found += [tokenizer.decode(shards.tokens(i).tolist()) for i in range(len(shards.lengths))]
    assert sorted(found) == sorted(texts_of(corpus))
    manifest = read_manifest(prepared)
    assert sum(s["bytes"] for s in manifest["splits"].values()) == sum(len(t.encode()) for t in texts_of(corpus))
    assert manifest["splits"]["validation"]["documents"] > 5


def test_statistics_are_those_of_the_training_split(prepared):
    statistics = np.load(prepared / "statistics.npz")
    with Shards(prepared, "train") as shards:
        tokens = np.concatenate([shards.tokens(i) for i in range(len(shards.lengths))])
    assert np.array_equal(statistics["counts"], np.bincount(tokens, minlength=300))
    assert statistics["byte_lengths"][tokens].sum() == read_manifest(prepared)["splits"]["train"]["bytes"]


SCRIPT = """
import sys
from pathlib import Path
from bitlm_dist.data_prep import prepare as module
module.UNIT_BYTES = 3000
module.prepare([Path(sys.argv[1])], "bpe:300", Path(sys.argv[2]), 0.1)
"""


@pytest.mark.parametrize("units_before_kill", [1, 5])
def test_killed_at_any_unit_and_rerun_gives_the_same_tree(corpus, tmp_path, monkeypatch, units_before_kill):
    monkeypatch.setattr(module, "UNIT_BYTES", 3000)
    whole = tmp_path / "whole"
    report = prepare([corpus], "bpe:300", whole, 0.1)
    assert report.units > 8
    out = tmp_path / "killed"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # what SIGKILL leaves goes with the test's folder
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(corpus), str(out)], stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while len(list(out.glob("units/*.json"))) < units_before_kill and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = prepare([corpus], "bpe:300", out, 0.1)
    assert again.units_reused >= units_before_kill
    assert tree(out) == tree(whole)


def test_a_rerun_writes_nothing(corpus, prepared):
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*.mds.zstd")}
    report = prepare([corpus], "bpe:300", prepared, 0.1)
    assert report.units_reused == report.units
    assert before == {p: p.stat().st_mtime_ns for p in prepared.rglob("*.mds.zstd")}


def test_an_output_folder_of_other_origin_is_refused_and_kept(corpus, prepared, tmp_path):
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        prepare([corpus], "bpe:400", prepared, 0.1)
    with pytest.raises(UserError, match="prepared with another validation"):
        prepare([corpus], "bpe:300", prepared, 0.2)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="was not written by `bitlm prep`"):
        prepare([corpus], "bpe:300", other, 0.1)
    assert tree(other) == {"thesis.txt": b"do not touch"}


BAD = [
    (b"caf\xe9", "bpe:300", "text.txt is not UTF-8"),
    (b" \n", "bpe:300", "no document has any text"),
    (b"fine", "bpe:100", "bpe:SIZE with a size of at least 258"),
    (b"fine", "bpe:many", "bpe:SIZE with a size of at least 258"),
    (b"fine", "none.json", "tokenizer none.json does not exist"),
]


@pytest.mark.parametrize(("content", "tokenizer", "message"), BAD)
def test_bad_input_is_found_before_anything_is_written(tmp_path, content, tokenizer, message):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / "text.txt"], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_text_files_is_read_in_order(tmp_path):
    source = tmp_path / "texts"
    source.mkdir()
    for i in range(30):
        (source / f"{i:02d}.txt").write_text(f"document number {i} says hello\n" * 3)
    out = tmp_path / "out"
    assert prepare([source], "bpe:260", out, 0.0).documents == 30
    with Shards(out, "train") as shards:
        first = Tokenizer.of_folder(out / "tokenizer").decode(shards.tokens(0).tolist())
    assert first.startswith("document number 0 ")
    with pytest.raises(UserError, match="has no validation split"):
        Shards(out, "validation")
