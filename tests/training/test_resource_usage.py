import torch

from bitlm_dist.training import resource_usage
from bitlm_dist.training.resource_usage import memory_usage

CPU = torch.device("cpu")


def test_memory_of_the_host_follows_what_the_process_holds():
    before = memory_usage(CPU)
    held = bytearray(2**27)
    during = memory_usage(CPU)
    assert during["host_memory_bytes"] > before["host_memory_bytes"] + 2**26
    assert during["host_memory_peak_bytes"] >= during["host_memory_bytes"]

    del held
    after = memory_usage(CPU)
    assert after["host_memory_bytes"] < during["host_memory_bytes"] - 2**26
    assert after["host_memory_peak_bytes"] > during["host_memory_bytes"] - 2**20, "to some pages"
    assert after["device_memory_bytes"] is after["device_memory_peak_bytes"] is None


def test_a_system_that_does_not_tell_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(resource_usage, "PROCESS_STATUS", tmp_path / "nosuch")
    assert set(memory_usage(CPU).values()) == {None}
