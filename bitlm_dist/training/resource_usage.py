"""Memory of this process, on the host and on its GPU, without waiting for the device."""

from contextlib import suppress
from pathlib import Path

import torch

PROCESS_STATUS = Path("/proc/self/status")  # Linux only
# lines of that file: what is in memory now, and the most that ever was
_HOST_LINES = {"VmRSS": "host_memory_bytes", "VmHWM": "host_memory_peak_bytes"}


def memory_usage(device: torch.device) -> dict[str, int | None]:
    """Bytes of memory in use now and at the peak, by their keys in metrics.jsonl.

    Args:
        device: device of this process. On a GPU, tensors count; what the allocator holds in
            reserve does not.

    Returns:
        The values; None where there is no GPU, or the system does not tell.
    """
    usage: dict[str, int | None] = dict.fromkeys(_HOST_LINES.values())
    with suppress(OSError):
        for line in PROCESS_STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in _HOST_LINES:
                usage[_HOST_LINES[name]] = int(value.split()[0]) * 1024  # "  123 kB"

    is_gpu = device.type == "cuda"
    usage["device_memory_bytes"] = torch.cuda.memory_allocated(device) if is_gpu else None
    usage["device_memory_peak_bytes"] = torch.cuda.max_memory_allocated(device) if is_gpu else None
    return usage
