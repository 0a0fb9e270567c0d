import json
import shutil

from typer.testing import CliRunner

from bitlm_dist.cli import app


def verify(*words, code=0):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["data", "verify", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_verify_names_what_is_damaged_in_words_and_in_json(prepared, tmp_path):
    found = json.loads(verify(prepared, "--json"))
    assert found["folder"] == str(prepared)
    assert found["whole"]
    assert set(found["files"]) == {
        "tokenizer, indices, statistics",
        "shards, train",
        "shards, validation",
    }
    assert all(files["number"] and not files["problems"] for files in found["files"].values())

    folder = shutil.copytree(prepared, tmp_path / "data")
    shard = next((folder / "train").rglob("*.mds.zstd"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    found = json.loads(verify(folder, "--json", code=1))
    assert not found["whole"]
    assert found["files"]["shards, train"]["problems"] == [f"{shard} is damaged"]
    assert verify(folder, code=1).splitlines()[-1] == f"{shard} is damaged"


def test_bytes_of_all_tokens_are_written_and_told(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "data")
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    found = json.loads(verify(folder, "--write", "--json"))["token_bytes"]
    assert found["lossless"]
    assert {name: sizes["bytes"] for name, sizes in found["splits"].items()} == {
        name: sizes["bytes"] for name, sizes in splits.items()
    }
    assert "train: the tokens stand for " in verify(folder, "--write")

    (folder / "statistics.npz").unlink()
    assert "token_bytes" not in json.loads(verify(folder, "--write", "--json", code=1))
