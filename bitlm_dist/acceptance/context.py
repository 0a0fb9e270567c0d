"""What the checks of an acceptance run share: sizes, machine, folders, and earlier results."""

import shutil
from pathlib import Path
from typing import Any

from bitlm_dist.acceptance.commands import Commands
from bitlm_dist.acceptance.sizes import Sizes

NUM_CPU_RANKS = 2  # ranks that stand for two cards on a CPU


class Context:
    """State of an acceptance run.

    Args:
        sizes: of this kind of device.
        machine: as the module machine describes it.
        folder: an empty folder for data and runs.
        commands: runs the commands.

    Attributes:
        findings: those of `bitlm doctor`, by name; empty if it failed.
        reference_runs: metrics of runs that several checks compare with, by their words.
    """

    def __init__(
        self, sizes: Sizes, machine: dict[str, Any], folder: Path, commands: Commands
    ) -> None:
        self.sizes = sizes
        self.machine = machine
        self.folder = folder
        self.commands = commands
        self.findings: dict[str, dict[str, Any]] = {}
        self.reference_runs: dict[str, list[dict[str, Any]]] = {}

    @property
    def data(self) -> Path:
        """The prepared folder."""
        return self.folder / "data"

    @property
    def num_ranks(self) -> int:
        """Number of ranks that can train together."""
        return NUM_CPU_RANKS if self.sizes.device == "cpu" else int(self.machine["num_cards"])

    def finding(self, name: str) -> dict[str, Any] | None:
        """What `bitlm doctor` found under a name; None if it is not known."""
        return self.findings.get(name)

    def remove(self, run: Path) -> None:
        """Remove a run folder whose metrics have been read."""
        shutil.rmtree(run, ignore_errors=True)
