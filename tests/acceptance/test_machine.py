import subprocess
import types

import pytest
import torch

from bitlm_dist.acceptance import machine
from bitlm_dist.errors import UserError
from bitlm_dist.planning.flops import PEAK_FLOPS

H100 = "NVIDIA H100 80GB HBM3"


def test_a_cpu_has_no_card():
    found = machine.describe_machine("cpu")
    assert found["card"] == "cpu"
    assert found["num_cards"] == 1
    assert found["driver"] is found["peak_flops"] is found["memory_bytes"] is None
    assert found["packages"]["torch"] == torch.__version__


def test_without_a_gpu_the_remedy_is_named():
    with pytest.raises(UserError, match=r"no GPU here.*make gpu DEVICE=cpu"):
        machine.describe_machine("gpu")


@pytest.fixture
def cards(monkeypatch):
    """Two GPUs of some name, and what nvidia-smi answers."""

    def make(name, smi):
        properties = types.SimpleNamespace(total_memory=80 * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        run = subprocess.run

        def answer(command, **options):
            return smi(command) if command[0] == "nvidia-smi" else run(command, **options)

        monkeypatch.setattr(machine.subprocess, "run", answer)
        return machine.describe_machine("gpu")

    return make


def test_cards_are_described(cards):
    found = cards(H100, lambda command: types.SimpleNamespace(stdout="580.95.05\n"))
    assert (found["card"], found["num_cards"], found["driver"]) == (H100, 2, "580.95.05")
    assert found["peak_flops"] == PEAK_FLOPS["H100"]
    assert found["capability"] == [9, 0]


def test_an_unknown_card_without_nvidia_smi_is_described(cards):
    def missing(command):
        raise FileNotFoundError(command[0])

    found = cards("NVIDIA X1", missing)
    assert found["driver"] is found["peak_flops"] is None
