"""Location and ownership of a run's checkpoints.

They are in RUN/checkpoints, which is a folder or a link to one on another disk
(`checkpoint.dir`). All readers go through RUN/checkpoints. A folder behind the link holds
``run.lock``, which names the run that owns it and is locked while that run trains.
"""

from contextlib import suppress
from pathlib import Path
from typing import TextIO

from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.files import missing_folders, open_locked, remove_empty_folders
from bitlm_dist.launch.attempts import check_checkpoint_link
from bitlm_dist.paths import absolute_path

CHECKPOINTS = "checkpoints"
OWNER_FILE = "run.lock"


def checkpoint_steps(run: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending.

    Raises:
        UserError: RUN/checkpoints is a broken link.
    """
    check_checkpoint_link(run)
    return complete_steps(run / CHECKPOINTS)


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint.

    Raises:
        UserError: the checkpoint is not in a run folder.
    """
    candidates = [absolute_path(checkpoint).parents[1], checkpoint.resolve().parents[1]]

    # behind a link to another disk, only the lock file tells the run
    if owner := _owner_run(checkpoint.resolve().parent):
        candidates.append(owner)

    for run in candidates:
        if (run / "config.yaml").is_file():
            return run
    raise UserError(
        f"{checkpoint} is not in a run folder: name it as RUN/{CHECKPOINTS}/{checkpoint.name}"
    )


class CheckpointFolder:
    """A run's ownership of its checkpoint folder.

    A folder inside the run folder needs no lock of its own: the run folder's lock covers it.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = absolute_path(run)
        self._link = absolute_path(run) / CHECKPOINTS
        self._folder: Path | None = None
        self._lock_file: TextIO | None = None
        self._has_made_link = False
        self._created_folders: list[Path] = []  # by :meth:`acquire`, the innermost first

    def acquire(self, requested: Path | None) -> None:
        """Lock the folder for this run. The run folder is unchanged until :meth:`make_link`.

        Args:
            requested: ``checkpoint.dir``. None: RUN/checkpoints, or the folder to which it links.

        Raises:
            UserError: the folder belongs to another run, is in use, is not where this run's
                checkpoints are, or cannot be written.
        """
        folder = (
            absolute_path(requested).resolve() if requested is not None else self._link.resolve()
        )

        # the run folder itself may be reached through links
        inside = self._link.parent.resolve() / CHECKPOINTS
        if folder == inside and not self._link.is_symlink():
            return

        if self._link.is_symlink() and self._link.resolve() != folder:
            raise UserError(
                f"checkpoint.dir = {requested}, but {self._link} leads to {self._link.resolve()}: "
                "move the checkpoints and the link, or name that folder"
            )
        if self._link.is_dir() and not self._link.is_symlink():
            raise UserError(
                f"checkpoint.dir = {requested}, but {self._link} exists: "
                "move it to that folder, or leave the key out"
            )

        checkpoint_steps(self._run)  # raises if the link is broken
        self._raise_if_owned_by_other_run(folder)

        try:
            self._created_folders = missing_folders(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._acquire_lock(folder)
        except OSError as error:
            remove_empty_folders(self._created_folders)
            raise UserError(
                f"checkpoint.dir = {folder} cannot be used: {os_error_message(error)}"
            ) from error
        self._folder = folder

    def _raise_if_owned_by_other_run(self, folder: Path) -> None:
        owner = _owner_run(folder)
        parent = folder.parent
        run = self._run.resolve()

        # a lock file does not count if its run keeps its checkpoints elsewhere by now
        is_owned_by_other_run = (
            owner is not None
            and owner.resolve() != run
            and (owner / CHECKPOINTS).resolve() == folder
        )

        # the folder inside another run folder, which has no lock file of its own
        if (
            owner is None
            and folder.name == CHECKPOINTS
            and parent.resolve() != run
            and (parent / OWNER_FILE).is_file()
        ):
            owner = parent
            is_owned_by_other_run = True

        if is_owned_by_other_run:
            raise UserError(
                f"checkpoint.dir = {folder} has the checkpoints of the run {owner}: "
                "choose another folder"
            )
        if owner is None and not (self._run / "config.yaml").is_file() and complete_steps(folder):
            raise UserError(
                f"checkpoint.dir = {folder} has checkpoints of another run: "
                "choose an empty or a new folder"
            )

    def _acquire_lock(self, folder: Path) -> None:
        self._lock_file = open_locked(folder / OWNER_FILE, f"{self._run}\n")
        if self._lock_file is None:
            raise UserError(
                f"checkpoint.dir = {folder} is in use by the run {_owner_run(folder)}: "
                "wait for it, or choose another folder"
            )

    @property
    def _is_linked(self) -> bool:
        return self._has_made_link or self._link.is_symlink()

    def make_link(self) -> None:
        """Link RUN/checkpoints to the folder; a no-op if it is inside the run folder."""
        if self._folder is not None and not self._is_linked:
            self._link.symlink_to(self._folder)
            self._has_made_link = True

    def remove_link(self) -> None:
        """Undo :meth:`make_link`, if it was this object that made the link."""
        if self._has_made_link:
            self._link.unlink()
            self._has_made_link = False

    def release(self) -> None:
        """Unlock the folder. One that the run does not use yet is left as it was found."""
        if self._lock_file is None:
            return

        if self._folder is not None and not self._is_linked:
            with suppress(OSError):
                (self._folder / OWNER_FILE).unlink()
            remove_empty_folders(self._created_folders)
        self._lock_file.close()
        self._lock_file = None


def _owner_run(folder: Path) -> Path | None:
    """The run that the lock file names, if there is one."""
    try:
        text = (folder / OWNER_FILE).read_text().strip()
    except OSError:
        return None
    return Path(text) if text.startswith("/") else None
