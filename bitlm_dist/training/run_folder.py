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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import Any, TextIO
from zipfile import BadZipFile

import numpy as np
import torch

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.config_loading import to_yaml
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.errors import UserError
from bitlm_dist.files import (
    fsync_folder,
    fsync_tree,
    missing_folders,
    open_locked,
    remove_empty_folders,
    save_npz,
    write_atomically,
)
from bitlm_dist.launch.records import parse_records, read_jsonl
from bitlm_dist.package_versions import PACKAGES, package_version
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.strict_json import to_json
from bitlm_dist.training.checkpoint_folder import CHECKPOINTS, CheckpointFolder
from bitlm_dist.training.evaluation_records import BY_TRAINING, EVALUATIONS
from bitlm_dist.training.metrics import LOG_FILES, METRICS
from bitlm_dist.training.run_claim import check_claim, has_started, run_folder_error
from bitlm_dist.training.stop_signals import STOP_FILE
from bitlm_dist.training.trained_files import CODES, TOKENIZER, missing_codes_error
from bitlm_dist.training.wandb_log import WANDB, record_sent_steps

VOCABULARY_IN_PROGRESS = ".vocabulary"
LOCK = "run.lock"
VISIBILITY_TIMEOUT_SECONDS = 10.0  # for a new file to reach other nodes on a network file system


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
        self._has_started = False  # at :meth:`acquire`; see run_claim.has_started
        self._has_written = False  # the metadata of a run that had not started
        self._found_config = False  # at :meth:`acquire`
        # writes what :meth:`acquire` was given; None before it, and from :meth:`begin` on
        self._write_new_metadata: Callable[[], None] | None = None
        self._created_folders: list[Path] = []  # by :meth:`acquire`, the innermost first

    def acquire(self, config: Config, tokenizer_folder: Path, codes: BitCodes) -> None:
        """Lock the folder for this process, or refuse it.

        Apart from the lock, nothing in the folder changes before :meth:`begin`. The lock
        is held until :meth:`release`, or until the process ends for whatever reason.

        Raises:
            UserError: The folder holds a run with another config, tokenizer or codes, or files that
                belong to no run; another process uses it; it cannot be written; or its checkpoints
                cannot be stored where the config says.
        """
        with self._reporting_os_errors():
            check_claim(self.path, config)
            self._has_started = has_started(self.path)
            self._found_config = (self.path / "config.yaml").exists()
            if self._has_started:
                self._check_same_vocabulary(Tokenizer.from_folder(tokenizer_folder), codes)

            try:
                self._acquire_lock()
                self._checkpoint_folder.acquire(config.checkpoint.dir)
                # Whoever had the lock is gone, and so is the process that this file was to stop.
                self.stop_file.unlink(missing_ok=True)
            except BaseException:
                self.release()
                raise
        self._write_new_metadata = partial(self.write_metadata, config, tokenizer_folder, codes)

    def begin(self, step: int) -> None:
        """Write the metadata with the first line of the logs; no-op from the second call on.

        A process that ends before leaves no trace.

        Args:
            step: The step that was loaded. Metrics of later steps, left by a process that was
                killed before it saved, are dropped.

        Raises:
            UserError: See :meth:`write_metadata`.
        """
        write = self._write_new_metadata
        self._write_new_metadata = None
        if write is not None:
            write()
            self.drop_metrics_after(step)

    def write_metadata(self, config: Config, tokenizer_folder: Path, codes: BitCodes) -> None:
        """Write the run's config, environment, tokenizer and codes.

        Raises:
            UserError: The folder cannot be written. What was written of a new run is removed.
        """
        with self._reporting_os_errors():
            try:
                if not self._has_started:
                    self._remove_metadata()  # of a start that took no step
                    self._has_written = True
                self._write_metadata(config, tokenizer_folder, codes)
            except OSError:
                if not self._has_started:
                    self._remove_metadata()
                raise

    def _write_metadata(self, config: Config, tokenizer_folder: Path, codes: BitCodes) -> None:
        self._checkpoint_folder.make_link()
        write_atomically(self.path / "config.yaml", to_yaml(config, in_run_folder=True))
        write_atomically(self.path / "environment.json", to_json(environment(), indent=1) + "\n")
        if not (self.path / TOKENIZER).is_dir():
            self._save_vocabulary(Tokenizer.from_folder(tokenizer_folder), codes)

    def _remove_metadata(self) -> None:
        """Remove what a start that took no step wrote, all of it or some."""
        self._checkpoint_folder.remove_link()
        names = ["environment.json", CODES, TOKENIZER, VOCABULARY_IN_PROGRESS]
        names += ["tensorboard", "wandb", WANDB]
        names += [file.name for file in self.path.glob(".*.partial")]
        # who put it there, if it was not this process, is not known
        if not self._found_config:
            names.append("config.yaml")
        for name in names:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()

    @contextmanager
    def _reporting_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise run_folder_error(self.path, error) from error

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
        self._created_folders = missing_folders(self.path)
        self.path.mkdir(parents=True, exist_ok=True)

        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
        lock = self.path / LOCK
        while True:
            self._lock_file = open_locked(lock, owner)
            if self._lock_file is None:
                raise UserError(
                    f"run.dir = {self.path} is in use by {self.lock_owner or 'another process'}: "
                    "wait for it, end it, or choose another folder"
                )

            # The owner before may have removed the file between its opening and its locking.
            if lock.exists() and os.path.samestat(os.fstat(self._lock_file.fileno()), lock.stat()):
                return
            self._lock_file.close()

    def release(self) -> None:
        """Release the lock. A folder in which no run was begun is left as it was found."""
        is_locked = self._lock_file is not None
        if is_locked and self._has_written and not self._has_taken_step():
            self._remove_metadata()

        is_used = (self.path / "config.yaml").exists()
        self._checkpoint_folder.release()
        if self._lock_file is not None:
            if not is_used:
                with suppress(OSError):
                    (self.path / LOCK).unlink()
            self._lock_file.close()
            self._lock_file = None

        if not is_used:
            remove_empty_folders(self._created_folders)
        self._created_folders = []

    def _has_taken_step(self) -> bool:
        try:
            return has_started(self.path)
        except (OSError, UserError):  # in doubt, nothing is removed
            return True

    def _check_same_vocabulary(self, tokenizer: Tokenizer, codes: BitCodes) -> None:
        if not (self.path / TOKENIZER).is_dir():  # killed before it was saved
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
        building = self.path / VOCABULARY_IN_PROGRESS
        shutil.rmtree(building, ignore_errors=True)  # left by a killed process
        tokenizer.save(building / TOKENIZER)
        save_npz(building / CODES, codes=codes.code_of_token.cpu().numpy(), bits=codes.num_bits)
        fsync_tree(building)

        # The codes come first: readers and the next start look for the tokenizer.
        (building / CODES).rename(self.path / CODES)
        (building / TOKENIZER).rename(self.path / TOKENIZER)
        building.rmdir()
        fsync_folder(self.path)

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.from_folder(self.path / TOKENIZER)

    def codes(self) -> BitCodes:
        """The run's codes.

        Raises:
            UserError: Their file is missing or damaged.
        """
        try:
            with np.load(self.path / CODES) as archive:
                return BitCodes(torch.from_numpy(archive["codes"]), int(archive["bits"]))
        except FileNotFoundError:
            raise missing_codes_error(self.path, "is missing") from None
        # An empty file, one that was cut, no archive, an archive of other things.
        except (EOFError, BadZipFile, ValueError, KeyError):
            raise missing_codes_error(self.path, "is damaged") from None

    def drop_metrics_after(self, step: int) -> None:
        """Drop the metrics of steps that a killed process took after its last checkpoint.

        The steps that were sent to W&B are recorded first, as they cannot be taken back there.
        """
        files = [self.path / name for name in LOG_FILES]
        lines_per_file = {
            file: file.read_text().splitlines() if file.is_file() else [] for file in files
        }
        record_sent_steps(
            self.path,
            {
                file.name: max(_steps_by_training(parse_records(lines)), default=0)
                for file, lines in lines_per_file.items()
            },
        )

        for file, lines in lines_per_file.items():
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                write_atomically(file, "".join(line + "\n" for line in kept))

    def losses(self) -> list[float]:
        """The loss of every recorded step, in order; NaN where it was not finite."""
        records = read_jsonl(self.path / METRICS)
        losses = [record["loss"] for record in records if "loss" in record]
        return [nan if loss is None else float(loss) for loss in losses]

    def last_finite_loss(self) -> tuple[float, int] | None:
        """The last finite recorded loss and its step; None if there is none."""
        last = None
        for record in read_jsonl(self.path / METRICS):
            loss = record.get("loss")
            if loss is not None and isfinite(loss):
                last = float(loss), int(record["step"])
        return last

    def last_evaluation(self, step: int) -> int:
        """The last step up to ``step`` that training has evaluated; 0: none.

        `bitlm eval` appends to the same file.
        """
        steps = _steps_by_training(read_jsonl(self.path / EVALUATIONS))
        return max((s for s in steps if s <= step), default=0)


def _steps_by_training(records: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    """The steps of records that training wrote, and not `bitlm eval`, which sends none to W&B."""
    for record in records:
        # Older versions did not say, as only training wrote evaluations.
        if "step" in record and record.get("by", BY_TRAINING) == BY_TRAINING:
            yield int(record["step"])


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a kill cut in half, or none of ours
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
