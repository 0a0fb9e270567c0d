import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from bitlm_dist.config_loading import load_run_config
from bitlm_dist.errors import UserError
from bitlm_dist.training import export
from bitlm_dist.training.export import export_checkpoint, import_checkpoint
from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import load_trained_model, model_state_dict

pytestmark = pytest.mark.integration


@pytest.fixture
def run(tiny, tmp_path):
    trainer = Trainer.build(tiny("--optimizer.ema", "0.5")).open()
    trainer.fit(until=3)
    trainer.close()
    return tmp_path / "run"


def newest(run):
    return run / "checkpoints" / "latest"


def weights_of(run, *words):
    _, model, step = load_trained_model(run, load_run_config(run, list(words)))
    return {name: part.full.clone() for name, part in model_state_dict([model]).items()}, step


@pytest.mark.parametrize("file_bytes", [10**9, 20_000])
@pytest.mark.parametrize("averaged", [False, True])
def test_out_and_back(run, tmp_path, file_bytes, averaged):
    expected, _ = weights_of(run, "--evaluation.use_ema", str(averaged).lower())
    size = export_checkpoint(newest(run), tmp_path / "out", averaged, file_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == size

    found = {}
    weight_map = {}
    for file in files:
        part = load_file(file)
        assert file.stat().st_size < file_bytes + 1000 or len(part) == 1
        found |= part
        weight_map |= dict.fromkeys(part, file.name)

    if file_bytes < 10**6:
        assert len(files) > 3
        assert (
            json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())[
                "weight_map"
            ]
            == weight_map
        )
    else:
        assert [file.name for file in files] == ["model.safetensors"]

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    import_checkpoint(tmp_path / "out", tmp_path / "back")
    again, step = weights_of(tmp_path / "back")

    assert step == 3
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert load_run_config(tmp_path / "back").run.dir == tmp_path / "back"
    assert not list(tmp_path.glob(".*"))


def test_imported_weights_are_not_taken_for_a_run_to_go_on_with(run, tiny, tmp_path):
    export_checkpoint(newest(run), tmp_path / "out")
    import_checkpoint(tmp_path / "out", tmp_path / "back")
    with pytest.raises(
        UserError,
        match="was imported and holds weights alone: it can be evaluated and generated from",
    ):
        Trainer.build(tiny("--optimizer.ema", "0.5", "--run.dir", str(tmp_path / "back"))).open()


def test_bad_input_is_named_and_nothing_is_left(run, tiny, tmp_path):
    export_checkpoint(newest(run), tmp_path / "out")
    for refused, message in (
        (
            lambda: export_checkpoint(newest(run), tmp_path / "out"),
            "out exists: name a folder that does not",
        ),
        (lambda: import_checkpoint(tmp_path / "out", run), "run exists"),
        (
            lambda: import_checkpoint(run, tmp_path / "back"),
            "run is not an exported folder: export.json cannot be read: .*: check the path$",
        ),
    ):
        with pytest.raises(UserError, match=message):
            refused()

    weights = tmp_path / "out" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"!")
    with pytest.raises(UserError, match="model.safetensors is damaged: export again"):
        import_checkpoint(tmp_path / "out", tmp_path / "back")
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        import_checkpoint(tmp_path / "out", tmp_path / "back")

    record = tmp_path / "out" / "export.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 9}))
    with pytest.raises(UserError, match="has export format 9, this version reads up to 1: upgrade"):
        import_checkpoint(tmp_path / "out", tmp_path / "back")

    record.write_text("{}")
    with pytest.raises(UserError, match=r"export.json in it is of another program, or damaged$"):
        import_checkpoint(tmp_path / "out", tmp_path / "back")

    assert not (tmp_path / "back").exists()
    other = Trainer.build(tiny("--run.dir", str(tmp_path / "plain"))).open()
    other.fit(until=1)
    other.close()
    with pytest.raises(UserError, match="holds no moving average: export without --averaged"):
        export_checkpoint(newest(tmp_path / "plain"), tmp_path / "averaged", use_ema=True)


def test_what_cannot_be_written_is_named_and_nothing_is_left(run, tmp_path, monkeypatch):
    def fail(problem):
        def raising(*arguments):
            raise problem

        return raising

    checkpoint = newest(run)
    full_disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    out = tmp_path / "new" / "out"
    before = sorted(tmp_path.rglob("*"))
    for step in ("_write_run_files", "write_atomically", "fsync_tree"):
        for problem in (full_disk, KeyboardInterrupt()):
            with monkeypatch.context() as patch, pytest.raises(type(problem)) as caught:
                patch.setattr(export, step, fail(problem))
                export_checkpoint(checkpoint, out)
            assert sorted(tmp_path.rglob("*")) == before
            assert getattr(caught.value, "filename", str(out)) == str(out)

    # before the work
    (tmp_path / "file").touch()
    for out, reason in (
        (tmp_path / "file" / "out", "Not a directory"),
        (tmp_path / ("x" * 252), "File name too long"),
    ):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=reason) as caught:
            patch.setattr(export.store, "verify", None)
            export_checkpoint(checkpoint, out)
        assert caught.value.filename == str(out)

    export_checkpoint(checkpoint, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    for place in ("training.run_folder.write_atomically", "checkpoint.store.write_atomically"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space") as caught:
            patch.setattr(f"bitlm_dist.{place}", fail(full_disk))
            import_checkpoint(tmp_path / "out", tmp_path / "back")
        assert caught.value.filename == str(tmp_path / "back")
        assert sorted(tmp_path.rglob("*")) == before
