"""The run folder: config, tokenizer, codes, environment, metrics and checkpoints.

It holds everything that `bitlm eval` and `bitlm generate` need.
"""

import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite, nan
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.config_loading import (
    config_paths,
    flatten,
    load_run_config,
    to_yaml,
    with_absolute_paths,
)
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.errors import UserError
from bitlm_dist.files import fsync_folder, fsync_tree, open_locked, write_atomically
from bitlm_dist.launch.attempts import check_run_folder
from bitlm_dist.package_versions import PACKAGES, package_version
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.paths import absolute_path as absolute_path
from bitlm_dist.strict_json import to_json
from bitlm_dist.training.checkpoint_folder import CHECKPOINTS, CheckpointFolder
from bitlm_dist.training.metrics import EVALUATIONS, METRICS, SAVES
from bitlm_dist.training.stop_signals import STOP_FILE
from bitlm_dist.training.wandb_log import record_sent_steps

CODES = "codes.npz"
LOCK = "run.lock"
VISIBILITY_TIMEOUT_SECONDS = 10.0  # for a new file to reach other nodes on a network file system
# Prefixes of keys that may change when a run resumes. Any other change would make it another run.
CHANGEABLE_KEYS = (
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
STEPS_KEY = "training.steps"
GLOBAL_BATCH_KEY = "training.global_batch_tokens"
SOURCES_KEY = "data.sources"
# Keys that may change if the config consents with another key.
CONSENT_KEYS = {
    GLOBAL_BATCH_KEY: "checkpoint.new_global_batch",
    SOURCES_KEY: "data.new_mixture",
}


class RunFolder:
    """A folder that one run owns.

    Args:
        path: The folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_file: TextIO | None = None
        self.checkpoints = path / CHECKPOINTS
        self._checkpoint_folder = CheckpointFolder(path)
        self.stop_file = path / STOP_FILE

    def acquire(self, config: Config, tokenizer_folder: Path, codes: BitCodes) -> None:
        """Lock the folder for this process, or refuse it.

        Apart from the lock, nothing in the folder changes before :meth:`write_metadata`. The lock
        is held until :meth:`release`, or until the process ends for whatever reason.

        Raises:
            UserError: The folder holds a run with another config, tokenizer or codes, or files that
                belong to no run; another process uses it; it cannot be written; or its checkpoints
                cannot be stored where the config says.
        """
        if (self.path / "config.yaml").is_file():
            self._check_same_config(load_run_config(self.path), config)
            self._check_same_vocabulary(Tokenizer.from_folder(tokenizer_folder), codes)
        check_run_folder(absolute_path(self.path), config_paths(config))

        with self._reporting_write_errors():
            self._acquire_lock()
            self._checkpoint_folder.acquire(config.checkpoint.dir)
            # Whoever had the lock before is gone, and so is the process that this file was to stop.
            self.stop_file.unlink(missing_ok=True)

    def write_metadata(self, config: Config, tokenizer_folder: Path, codes: BitCodes) -> None:
        """Write the run's config, environment, tokenizer and codes.

        Raises:
            UserError: The folder cannot be written.
        """
        with self._reporting_write_errors():
            self._checkpoint_folder.make_link()
            write_atomically(self.path / "config.yaml", to_yaml(config, in_run_folder=True))
            write_atomically(
                self.path / "environment.json", to_json(environment(), indent=1) + "\n"
            )

            if not (self.path / "tokenizer").is_dir():
                self._save_vocabulary(Tokenizer.from_folder(tokenizer_folder), codes)

    @contextmanager
    def _reporting_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run.dir = {self.path} cannot be written ({error}): "
                "free space, or choose another folder"
            ) from error

    @property
    def lock_owner(self) -> str:
        """The process that holds the lock, or held it last."""
        try:
            return (self.path / LOCK).read_text().strip()
        except OSError:
            return ""

    def check_shared_by_all_ranks(self, layout: ParallelLayout) -> None:
        """Check that all ranks see the folder that rank 0 has locked. Collective.

        Raises:
            UserError: On every rank, if one of them sees another folder than rank 0.
        """
        expected = mesh.broadcast_object(self.lock_owner, layout)
        deadline = time.monotonic() + VISIBILITY_TIMEOUT_SECONDS
        while self.lock_owner != expected and time.monotonic() < deadline:
            time.sleep(0.1)

        # All ranks learn of all mismatches and raise together, so that none waits for the others.
        mismatched_hosts = mesh.all_gather_object(
            None if self.lock_owner == expected else socket.gethostname(), layout
        )
        for rank, host in enumerate(mismatched_hosts):
            if host is not None:
                raise UserError(
                    f"run.dir = {self.path} is not the same folder for rank {rank} on {host} "
                    "as for the first rank: choose one on a file system that all nodes share"
                )

    def _acquire_lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lock_file = open_locked(
            self.path / LOCK, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
        )

        if self._lock_file is None:
            owner = self.lock_owner or "another process"
            raise UserError(
                f"run.dir = {self.path} is in use by {owner}: "
                "wait for it, end it, or choose another folder"
            )

    def release(self) -> None:
        """Release the lock."""
        self._checkpoint_folder.release()
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def _check_same_config(self, saved: Config, current: Config) -> None:
        old, new = (_comparable(config) for config in (saved, current))
        for key, value in new.items():
            # Other schedules stretch over all steps, so a longer run would have trained otherwise.
            is_allowed_lengthening = key == STEPS_KEY and current.optimizer.schedule == "constant"
            if old.get(key) == value or key.startswith(CHANGEABLE_KEYS) or is_allowed_lengthening:
                continue

            if not is_change_allowed(key, current):
                note = f" ({CONSENT_KEYS[key]} = true allows it)" if key in CONSENT_KEYS else ""
                note = " (the schedule depends on it)" if key == STEPS_KEY else note
                raise UserError(
                    f"run.dir = {self.path} holds a run with {key} = {old.get(key)}, "
                    f"now {value}{note}: choose another run.dir or the same value"
                )

    def _check_same_vocabulary(self, tokenizer: Tokenizer, codes: BitCodes) -> None:
        if not (self.path / "tokenizer").is_dir():  # killed before it was saved
            return

        has_same_tokenizer = self.tokenizer().fingerprint == tokenizer.fingerprint
        if not has_same_tokenizer or not torch.equal(
            self.codes().code_of_token, codes.code_of_token.cpu()
        ):
            what = "codes" if has_same_tokenizer else "tokenizer"
            raise UserError(
                f"run.dir = {self.path} was trained with another {what} than data.path has: "
                "use the data that it was trained with"
            )

    def _save_vocabulary(self, tokenizer: Tokenizer, codes: BitCodes) -> None:
        """Write tokenizer and codes; a folder ``tokenizer`` must imply that both are complete."""
        building = self.path / ".vocabulary"
        shutil.rmtree(building, ignore_errors=True)  # left by a killed process
        tokenizer.save(building / "tokenizer")
        np.savez(building / CODES, codes=codes.code_of_token.cpu().numpy(), bits=codes.num_bits)
        fsync_tree(building)

        # The codes come first: readers and the next start look for the tokenizer.
        (building / CODES).rename(self.path / CODES)
        (building / "tokenizer").rename(self.path / "tokenizer")
        building.rmdir()
        fsync_folder(self.path)

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.from_folder(self.path / "tokenizer")

    def codes(self) -> BitCodes:
        """The run's codes."""
        with np.load(self.path / CODES) as archive:
            return BitCodes(torch.from_numpy(archive["codes"]), int(archive["bits"]))

    def drop_metrics_after(self, step: int) -> None:
        """Drop the metrics of steps that a killed process took after its last checkpoint.

        The steps that were sent to W&B are recorded first, as they cannot be taken back there.
        """
        files = [self.path / name for name in (METRICS, EVALUATIONS, SAVES)]
        lines_per_file = [file.read_text().splitlines() if file.is_file() else [] for file in files]
        steps = [[_step_of(line) for line in lines] for lines in lines_per_file]

        # A line that was cut in half has no step (infinity here).
        valid_steps = [[int(number) for number in numbers if isfinite(number)] for numbers in steps]
        record_sent_steps(
            self.path,
            {
                file.name: max(numbers, default=0)
                for file, numbers in zip(files, valid_steps, strict=True)
            },
        )

        for file, lines, numbers in zip(files, lines_per_file, steps, strict=True):
            kept = [line for line, number in zip(lines, numbers, strict=True) if number <= step]
            if len(kept) < len(lines):
                write_atomically(file, "".join(line + "\n" for line in kept))

    def losses(self) -> list[float]:
        """The loss of every recorded step, in order; NaN where it was not finite."""
        file = self.path / METRICS
        lines = file.read_text().splitlines() if file.is_file() else []
        losses = [json.loads(line)["loss"] for line in lines if isfinite(_step_of(line))]
        return [nan if loss is None else float(loss) for loss in losses]

    def last_finite_loss(self) -> tuple[float, int] | None:
        """The last finite recorded loss and its step; None if there is none."""
        file = self.path / METRICS
        for line in reversed(file.read_text().splitlines() if file.is_file() else []):
            if isfinite(_step_of(line)):
                entry = json.loads(line)
                if entry["loss"] is not None and isfinite(entry["loss"]):
                    return float(entry["loss"]), int(entry["step"])
        return None

    def last_evaluation(self, step: int) -> int:
        """The last step up to ``step`` with a recorded evaluation; 0: none."""
        file = self.path / EVALUATIONS
        steps = [_step_of(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return int(max((s for s in steps if s <= step), default=0))


def _comparable(config: Config) -> dict[str, Any]:
    """Values by dotted key, without the sources' paths: their contents are compared elsewhere."""
    values = dict(flatten(with_absolute_paths(config).model_dump(mode="json")))
    values[SOURCES_KEY] = [{**source, "path": "…"} for source in values[SOURCES_KEY]]
    return values


def is_change_allowed(key: str, config: Config) -> bool:
    """True if a config consents to the change of a key that a run keeps otherwise."""
    return key in CONSENT_KEYS and bool(dict(flatten(config.model_dump()))[CONSENT_KEYS[key]])


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # a line that a kill cut in half
        return float("inf")


def environment() -> dict[str, Any]:
    """Command, versions and device of this process, as recorded in the run folder."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }
