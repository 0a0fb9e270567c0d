"""Values that travel from the device to the host while the device works on."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """A moment by three clocks."""

    time: float  # seconds since 1970
    seconds: float  # by time.perf_counter
    cpu_seconds: float  # CPU time of this process

    @classmethod
    def now(cls) -> "Moment":
        """The current moment."""
        return cls(time.time(), time.perf_counter(), time.process_time())


class DeviceReadback:
    """One asynchronous copy of some tensors to the host.

    All tensors travel as one of fp64, which is exact for counts up to 2^53.

    Args:
        tensors: what is to be read, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        packed = torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()])
        # torch allocates pinned memory for it, without which the copy would block the host
        self._copy = packed.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        self._completed = Moment.now()

        if packed.device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)  # a wait leaves the core to others
            self._event.record()

    def read(self) -> tuple[dict[str, list[float]], Moment]:
        """Wait for the copy.

        Returns:
            The elements of each tensor, and when the host saw that they were complete.
        """
        if self._event is not None:
            self._event.synchronize()
            self._completed = Moment.now()

        parts = self._copy.split(list(self._sizes.values()))
        values = {name: part.tolist() for name, part in zip(self._sizes, parts, strict=True)}
        return values, self._completed
