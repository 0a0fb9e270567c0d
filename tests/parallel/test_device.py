"""Each rank finds its own GPU, or says in one line why there is none.

torch.cuda is replaced, so that the tests run on machines without GPUs.
"""

import pytest
import torch

from bitlm_dist.errors import UserError
from bitlm_dist.parallel import device
from bitlm_dist.parallel.device import find_device, set_cuda_environment, warning_of_unused_gpus


@pytest.fixture
def gpus(monkeypatch):
    """Function that pretends a working CUDA with some number of visible GPUs."""

    def make(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return make


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Function that pretends a CUDA that does not work.

    It takes the number of GPUs of the machine, the CUDA version of PyTorch's build or None, and the
    driver's error message.
    """

    def make(count, build, said=""):
        def fail():
            raise RuntimeError(said)

        for number in range(count):
            (tmp_path / f"nvidia{number}").touch()
        (tmp_path / "nvidia-uvm").touch()
        monkeypatch.setattr(device, "DEV", tmp_path)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", fail)

    return make


@pytest.mark.parametrize(
    ("environment", "visible", "index"),
    [
        ({}, 1, 0),
        ({}, 8, 0),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, 8, 3),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 8, 3),
        ({"LOCAL_RANK": "3"}, 8, 3),
        # Slurm binds one GPU, or two, to each of four tasks
        ({"LOCAL_RANK": "3", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, 1, 0),
        (
            {"LOCAL_RANK": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "8"},
            2,
            0,
        ),
        ({"LOCAL_RANK": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, 1, 0),
    ],
)
def test_a_rank_has_a_gpu_of_its_own(environment, visible, index, gpus):
    gpus(visible)
    assert find_device(environment) == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("environment", "visible", "said"),
    [
        (
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"},
            4,
            "LOCAL_RANK=0 of 8 ranks on this node has no GPU of its own (4 visible)",
        ),
        (
            {"LOCAL_RANK": "7"},
            4,
            "LOCAL_RANK=7 of 8 ranks on this node has no GPU of its own (4 visible)",
        ),
        (
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5"},
            1,
            "(1 visible; CUDA_VISIBLE_DEVICES=5)",
        ),
        # more tasks than GPUs, whether they are bound or not
        (
            {"LOCAL_RANK": "1", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "4"},
            4,
            "of 8 ranks",
        ),
        (
            {"LOCAL_RANK": "1", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "4"},
            1,
            "of 8 ranks",
        ),
        # one has failed, or half of them are hidden: they are not bound to tasks
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "SLURM_GPUS_ON_NODE": "8"}, 7, "(7 visible)"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "SLURM_GPUS_ON_NODE": "8"}, 4, "(4 visible)"),
    ],
)
def test_ranks_without_a_gpu_are_refused(environment, visible, said, gpus):
    gpus(visible)
    with pytest.raises(UserError) as error:
        find_device(environment)
    assert said in str(error.value)
    assert str(error.value).endswith("start one rank per GPU, or make more of them visible")


def test_a_driver_too_old_for_the_build_is_an_error(machine):
    said = (
        "The NVIDIA driver on your system is too old (found version 12020). "
        "Please update your GPU driver by …"
    )
    machine(2, "13.0", said)

    with pytest.raises(
        UserError,
        match=r"this machine's GPUs \(The NVIDIA driver .* \(found version 12020\)\): install",
    ):
        find_device({})

    for hidden in ("", "-1"):
        assert find_device({"CUDA_VISIBLE_DEVICES": hidden}) == torch.device("cpu"), (
            "the user wants no GPU"
        )


def test_without_a_gpu_the_cpu_is_used(machine):
    machine(0, "13.0")
    assert find_device({}) == torch.device("cpu")
    assert warning_of_unused_gpus() is None


def test_a_cpu_build_beside_gpus_is_said(machine, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(2, None)
    assert find_device({}) == torch.device("cpu")
    assert "was built without CUDA, so the 2 GPUs here are not used" in warning_of_unused_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert warning_of_unused_gpus() is None


def test_what_cuda_reads_at_its_start_is_set_unless_the_user_did(tiny):
    def after(*words, **environment):
        set_cuda_environment(tiny(*words), environment)
        return environment

    assert after() == {}
    assert after("--parallel.tensor", "2") == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert after("--parallel.tensor", "2", CUDA_DEVICE_MAX_CONNECTIONS="8") == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8"
    }
    assert after("--training.deterministic", "true") == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
