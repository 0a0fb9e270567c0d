"""Where a run keeps its checkpoints: RUN/checkpoints, which is a folder or a link to one on another disk (`checkpoint.dir`).

All that reads checkpoints goes through RUN/checkpoints. A folder behind the link holds ``run.lock``, which names the run that it
belongs to and is locked while that run trains.
"""

from pathlib import Path
from typing import TextIO

from bitlm_dist.checkpoint import store
from bitlm_dist.errors import UserError
from bitlm_dist.files import locked
from bitlm_dist.launch.attempts import check_link
from bitlm_dist.paths import absolute

CHECKPOINTS, OWNER = "checkpoints", "run.lock"


def steps_of(run: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending.

    Raises:
        UserError: the checkpoints are behind a link that leads nowhere.
    """
    check_link(run)
    return store.complete_steps(run / CHECKPOINTS)


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint.

    Raises:
        UserError: it lies in none.
    """
    found = [absolute(checkpoint).parents[1], checkpoint.resolve().parents[1]]
    if owner := _owner(checkpoint.resolve().parent):
        found.append(owner)
    for run in found:
        if (run / "config.yaml").is_file():
            return run
    raise UserError(f"{checkpoint} lies in no run folder: name it as RUN/{CHECKPOINTS}/{checkpoint.name}")


class CheckpointPlace:
    """The claim of a run to the folder of its checkpoints; within the run folder it has that by the run folder's own lock.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._link = absolute(run), absolute(run) / CHECKPOINTS
        self._place: Path | None = None
        self._lock: TextIO | None = None

    def claim(self, wanted: Path | None) -> None:
        """Make the folder this run's, or refuse; in the run folder nothing changes before :meth:`make_link`.

        Args:
            wanted: ``checkpoint.dir``; None: RUN/checkpoints, wherever that leads.

        Raises:
            UserError: it belongs to another run, is in use, or is not where the run's checkpoints are; or it cannot be written.
        """
        place = absolute(wanted).resolve() if wanted is not None else self._link.resolve()
        inside = self._link.parent.resolve() / CHECKPOINTS  # the run folder itself may be reached through links
        if place == inside and not self._link.is_symlink():
            return
        if self._link.is_symlink() and self._link.resolve() != place:
            raise UserError(
                f"checkpoint.dir = {wanted}, but {self._link} leads to {self._link.resolve()}: move the checkpoints and the link, "
                "or name that folder"
            )
        if self._link.is_dir() and not self._link.is_symlink():
            raise UserError(f"checkpoint.dir = {wanted}, but {self._link} is there: move it to that folder, or leave the key out")
        steps_of(self._run)
        self._refuse_others(place)
        try:
            place.mkdir(parents=True, exist_ok=True)
            self._hold(place)
        except OSError as error:
            raise UserError(
                f"checkpoint.dir = {place} cannot be written ({error}): free space, or choose another folder"
            ) from error
        self._place = place

    def _refuse_others(self, place: Path) -> None:
        owner, around = _owner(place), place.parent
        run = self._run.resolve()
        is_theirs = owner is not None and owner.resolve() != run and (owner / CHECKPOINTS).resolve() == place
        if owner is None and place.name == CHECKPOINTS and around.resolve() != run and (around / OWNER).is_file():
            owner, is_theirs = around, True
        if is_theirs:
            raise UserError(f"checkpoint.dir = {place} has the checkpoints of the run {owner}: choose another folder")
        if owner is None and not (self._run / "config.yaml").is_file() and store.complete_steps(place):
            raise UserError(f"checkpoint.dir = {place} has checkpoints of another run: choose an empty or a new folder")

    def _hold(self, place: Path) -> None:
        self._lock = locked(place / OWNER, f"{self._run}\n")
        if self._lock is None:
            raise UserError(f"checkpoint.dir = {place} is in use by the run {_owner(place)}: wait for it, or choose another folder")

    def make_link(self) -> None:
        """Let RUN/checkpoints lead to the folder."""
        if self._place is not None and not self._link.is_symlink():
            self._link.symlink_to(self._place)

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _owner(place: Path) -> Path | None:
    try:
        text = (place / OWNER).read_text().strip()
    except OSError:
        return None
    return Path(text) if text.startswith("/") else None
