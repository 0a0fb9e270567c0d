"""The run folder: config, tokenizer, codes, environment, metrics, checkpoints; everything `eval` and `generate` need."""

import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from math import isfinite, nan
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.config_loading import absolute, flatten, paths_of, read_run, to_yaml
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.errors import UserError
from bitlm_dist.files import locked, sync_folder, sync_tree, to_json, write_atomically
from bitlm_dist.launch.attempts import check_free
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.paths import absolute as absolute_path
from bitlm_dist.training.checkpoint_place import CHECKPOINTS, CheckpointPlace
from bitlm_dist.training.metrics import EVALUATIONS, METRICS, SAVES
from bitlm_dist.training.stopping import STOP_FILE
from bitlm_dist.training.wandb_log import remember_sent

CODES = "codes.npz"
LOCK = "run.lock"
SHARED_WITHIN = 10.0  # seconds in which a network file system shows other nodes a file
PACKAGES = ("torch", "megatron-core", "deepspeed", "mosaicml-streaming", "triton", "numpy", "bitlm-dist")
# A resumed run may differ from the saved one in these; anything else would make it another run.
MAY_CHANGE = (
    "run.",
    "checkpoint.",
    "evaluation.",
    "sampling.",
    "logging.",
    "parallel.",
    "head.engine",
    "head.zero_stage",
    "head.offload",
    "optimizer.sharded",
    "optimizer.fused",
    "training.deterministic",
    "data.cache",
    "data.cache_limit",
    "data.workers",
    "data.path",
    "data.new_mixture",
)
LENGTHEN, BATCH, SOURCES = "training.steps", "training.global_batch_tokens", "data.sources"
ALLOWING = {BATCH: "checkpoint.new_global_batch", SOURCES: "data.new_mixture"}  # keys that allow a change of others


class RunFolder:
    """A folder that one run owns.

    Args:
        path: the folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None
        self.checkpoints = path / CHECKPOINTS
        self._place = CheckpointPlace(path)
        self.stop_file = path / STOP_FILE

    def claim(self, config: Config, tokenizer_folder: Path, codes: BitCodes) -> None:
        """Make the folder this process's, or refuse; but for the lock nothing in it changes before :meth:`record`.

        It is held until :meth:`release` or the process's end, however that comes.

        Raises:
            UserError: it holds a run of another config, tokenizer or codes, or files of other origin; another process has it; it
                cannot be written; or its checkpoints cannot lie where they should.
        """
        if (self.path / "config.yaml").is_file():
            self._compare(read_run(self.path), config)
            self._compare_vocabulary(Tokenizer.of_folder(tokenizer_folder), codes)
        check_free(absolute_path(self.path), paths_of(config))
        with self._writing():
            self._hold()
            self._place.claim(config.checkpoint.dir)
            self.stop_file.unlink(missing_ok=True)  # it was meant for a process that is gone

    def record(self, config: Config, tokenizer_folder: Path, codes: BitCodes) -> None:
        """Write config, environment, tokenizer and codes of the run that goes on in the folder now.

        Raises:
            UserError: it cannot be written.
        """
        with self._writing():
            self._place.make_link()
            write_atomically(self.path / "config.yaml", to_yaml(config, in_run_folder=True))
            write_atomically(self.path / "environment.json", to_json(environment(), indent=1) + "\n")
            if not (self.path / "tokenizer").is_dir():
                self._save_vocabulary(Tokenizer.of_folder(tokenizer_folder), codes)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run.dir = {self.path} cannot be written ({error}): free space, or choose another folder") from error

    @property
    def holder(self) -> str:
        """The process that has the folder, or had it last."""
        try:
            return (self.path / LOCK).read_text().strip()
        except OSError:
            return ""

    def check_shared(self, layout: Layout) -> None:
        """Compare what the processes of a job see under this path, once the first has claimed it.

        Raises:
            UserError: on every rank, if one sees another folder than the first.
        """
        expected, end = mesh.from_first(self.holder, layout), time.monotonic() + SHARED_WITHIN
        while self.holder != expected and time.monotonic() < end:
            time.sleep(0.1)
        places = mesh.from_all(None if self.holder == expected else socket.gethostname(), layout)
        for rank, host in enumerate(places):
            if host is not None:
                raise UserError(
                    f"run.dir = {self.path} is not the same folder for rank {rank} on {host} as for the first rank: "
                    "choose one on a file system that all nodes share"
                )

    def _hold(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lock = locked(self.path / LOCK, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        if self._lock is None:
            holder = self.holder or "another process"
            raise UserError(f"run.dir = {self.path} is in use by {holder}: wait for it, end it, or choose another folder")

    def release(self) -> None:
        """Let another process have the folder."""
        self._place.release()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _compare(self, found: Config, wanted: Config) -> None:
        old, new = (_comparable(config) for config in (found, wanted))
        for key, value in new.items():
            lengthened = key == LENGTHEN and wanted.optimizer.schedule == "constant"
            if old.get(key) == value or key.startswith(MAY_CHANGE) or lengthened:
                continue
            if not is_allowed(key, wanted):
                note = f" ({ALLOWING[key]} = true allows it)" if key in ALLOWING else ""
                note = " (the schedule depends on it)" if key == LENGTHEN else note
                raise UserError(
                    f"run.dir = {self.path} holds a run with {key} = {old.get(key)}, now {value}{note}: "
                    "choose another run.dir or the same value"
                )

    def _compare_vocabulary(self, tokenizer: Tokenizer, codes: BitCodes) -> None:
        if not (self.path / "tokenizer").is_dir():  # killed before it was saved
            return
        same = self.tokenizer().fingerprint == tokenizer.fingerprint
        if not same or not torch.equal(self.codes().code_of_token, codes.code_of_token.cpu()):
            what = "codes" if same else "tokenizer"
            raise UserError(f"run.dir = {self.path} was trained with another {what} than data.path has: use its data")

    def _save_vocabulary(self, tokenizer: Tokenizer, codes: BitCodes) -> None:
        building = self.path / ".vocabulary"
        shutil.rmtree(building, ignore_errors=True)  # what a killed process left
        tokenizer.save(building / "tokenizer")
        np.savez(building / CODES, codes=codes.code_of_token.cpu().numpy(), bits=codes.bits)
        sync_tree(building)
        (building / CODES).rename(self.path / CODES)
        (building / "tokenizer").rename(self.path / "tokenizer")
        building.rmdir()
        sync_folder(self.path)

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.of_folder(self.path / "tokenizer")

    def codes(self) -> BitCodes:
        """The run's codes."""
        with np.load(self.path / CODES) as found:
            return BitCodes(torch.from_numpy(found["codes"]), int(found["bits"]))

    def drop_metrics_after(self, step: int) -> None:
        """Forget metrics of steps that a killed run took after its last checkpoint; what W&B was sent of them is kept in mind."""
        files = [self.path / name for name in (METRICS, EVALUATIONS, SAVES)]
        every = [file.read_text().splitlines() if file.is_file() else [] for file in files]
        steps = [[_step_of(line) for line in lines] for lines in every]
        whole = [[int(number) for number in numbers if isfinite(number)] for numbers in steps]
        remember_sent(self.path, {file.name: max(numbers, default=0) for file, numbers in zip(files, whole, strict=True)})

        for file, lines, numbers in zip(files, every, steps, strict=True):
            kept = [line for line, number in zip(lines, numbers, strict=True) if number <= step]
            if len(kept) < len(lines):
                write_atomically(file, "".join(line + "\n" for line in kept))

    def losses(self) -> list[float]:
        """Loss of every step on record, in order."""
        file = self.path / METRICS
        lines = file.read_text().splitlines() if file.is_file() else []
        losses = [json.loads(line)["loss"] for line in lines if isfinite(_step_of(line))]
        return [nan if loss is None else float(loss) for loss in losses]

    def last_finite_loss(self) -> tuple[float, int] | None:
        """The last finite loss on record, and its step; None: there is none."""
        file = self.path / METRICS
        for line in reversed(file.read_text().splitlines() if file.is_file() else []):
            if isfinite(_step_of(line)):
                found = json.loads(line)
                if found["loss"] is not None and isfinite(found["loss"]):
                    return float(found["loss"]), int(found["step"])
        return None

    def last_evaluation(self, step: int) -> int:
        """The last step up to ``step`` that an evaluation is on record for; 0: none."""
        file = self.path / EVALUATIONS
        steps = [_step_of(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return int(max((s for s in steps if s <= step), default=0))


def _comparable(config: Config) -> dict[str, Any]:
    """Values by dotted key; where sources lie does not count, as their contents are compared."""
    values = dict(flatten(absolute(config).model_dump(mode="json")))
    values[SOURCES] = [{**source, "path": "…"} for source in values[SOURCES]]
    return values


def is_allowed(key: str, config: Config) -> bool:
    """Whether a config asks for a change of a key that a run keeps otherwise."""
    return key in ALLOWING and bool(dict(flatten(config.model_dump()))[ALLOWING[key]])


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # the line a kill cut in half
        return float("inf")


def environment() -> dict[str, Any]:
    """Versions and device, for the record of a run."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def package_version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
