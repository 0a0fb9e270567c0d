"""Runs that do not fit into the GPUs are refused before anything is built."""

from pathlib import Path

import pytest
import torch

from bitlm_dist.__main__ import main
from bitlm_dist.config_loading import load_config
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import build_layout
from bitlm_dist.planning.memory import GIB, estimate_worst_rank
from bitlm_dist.planning.memory_check import find_fit, with_changes

VOCABULARY = 151_669
UNSPLIT = ["--parallel.tensor", "1", "--parallel.sequence", "false"]


def load(name, *words):
    return load_config(Path(name), words).config


def needed(config, num_gpus):
    layout = build_layout(config.parallel, num_gpus, 0)
    return estimate_worst_rank(config, layout, VOCABULARY)[0].needed_bytes


@pytest.mark.parametrize(
    ("config", "num_gpus", "total", "keys"),
    [
        # smaller microbatches first, as they cost nothing
        (load("bitlm-0.6b", "--parallel.micro_batch_size", "4"), 8, 80, {"micro_batch_size"}),
        # then splits within a node, and recomputation only where these do not do
        (load("bitlm-8b", *UNSPLIT), 8, 80, {"tensor", "sequence"}),
        (load("bitlm-1.7b", *UNSPLIT), 1, 60, {"activation_checkpointing"}),
        (load("bitlm-8b"), 32, 16, {"pipeline"}),
        # state that every rank holds
        (
            load(
                "bitlm-1.7b",
                *("--optimizer.sharded", "false"),
                *("--parallel.tensor", "8", "--parallel.sequence", "true"),
            ),
            64,
            13,
            {"sharded"},
        ),
    ],
    ids=["microbatch", "tensor", "recompute", "pipeline", "sharded"],
)
def test_what_fits_is_found_and_fits(config, num_gpus, total, keys):
    layout = build_layout(config.parallel, num_gpus, 0)
    assert needed(config, num_gpus) > total * GIB
    changes = find_fit(config, layout, VOCABULARY, total * GIB, num_gpus)
    assert keys <= {key.rsplit(".", 1)[-1] for key in changes}, changes
    assert needed(with_changes(config, changes), num_gpus) <= total * GIB
    assert with_changes(config, {}) == config


def test_nothing_is_said_to_fit_where_nothing_does():
    config = load("bitlm-8b", *UNSPLIT)
    layout = build_layout(config.parallel, 1, 0)
    assert find_fit(config, layout, VOCABULARY, 80 * GIB, 1) is None
    assert find_fit(config, layout, VOCABULARY, 80 * GIB, 8) is not None


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU with half a gibibyte beyond the margin, as far as the check looks at it."""
    monkeypatch.setattr(mesh, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 6 * GIB + GIB // 2))


def train(*words):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["bitlm", "train", *map(str, words)])
        main()
    return ended.value.code


def test_a_run_is_refused_before_it_leaves_a_file(small_gpu, prepared, tiny_file, tmp_path, capsys):
    words = [tiny_file, "--data.path", prepared, "--run.dir", tmp_path / "run"]
    large = ["--model.backbone.hidden_size", "8192", "--data.sequence_length", "512"]
    assert train(*words, *large, "--training.global_batch_tokens", "4096") == 2

    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "training does not fit into the GPU's 6.5 GiB: a rank needs about" in line
    assert "--training.check_memory false" in line
    assert not (tmp_path / "run").exists()
