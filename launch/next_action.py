"""The action that follows an attempt: end, give up, or start the next one."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from bitlm_dist.launch.attempts import STOPPED_BY_USER, Attempt, Outcome
from bitlm_dist.launch.disk_room import full_disk


class Action(StrEnum):
    """What the launcher does after an attempt."""

    END = "end"  # trained, or ended by the user
    GIVE_UP = "give up"
    RESTART = "restart"  # in this allocation
    REQUEUE = "requeue"  # release the allocation and wait for another one
    RESUBMIT = "resubmit"  # the same, without the excluded nodes


@dataclass(frozen=True)
class NextAction:
    """The launcher's action after an attempt.

    Attributes:
        action: see :class:`Action`.
        reason: one line.
        exclude: nodes that the next job must not use.
        num_without_progress: number of attempts since the last one that made a new checkpoint.
    """

    action: Action
    reason: str
    exclude: tuple[str, ...] = ()
    num_without_progress: int = 0


def next_action(
    attempts: Sequence[Attempt], max_restarts: int, cancelled: bool, excluded: Sequence[str] = ()
) -> NextAction:
    """Decide what follows the last of ``attempts``.

    Only consecutive attempts without a new checkpoint count towards ``max_restarts``; a checkpoint
    beyond all earlier ones resets the count. So a run of weeks may fail many times, but a crash
    loop ends. A user error is fatal before the submission's first progress; after that it is
    probably transient, and only the same error twice in a row is fatal. A full disk is waited for,
    as the user may make room. A run that diverged is not restarted: it is a function of its config,
    and would diverge again.

    Args:
        attempts: oldest first; at least one.
        max_restarts: allowed consecutive restarts without a new checkpoint.
        cancelled: the user cancelled the run.
        excluded: nodes found bad before the last attempt.
    """
    last = attempts[-1]

    # these end the run, whatever happened before
    if last.outcome == Outcome.DONE:
        return NextAction(Action.END, f"trained: {last.reason}")
    if cancelled:
        return NextAction(Action.END, "cancelled")
    if last.outcome == Outcome.STOPPED and last.reason.startswith(STOPPED_BY_USER):
        return NextAction(Action.END, last.reason)
    if last.outcome == Outcome.DIVERGED:
        return NextAction(Action.GIVE_UP, last.reason)

    num_without_progress, has_progress = _count_without_progress(attempts)
    if last.outcome == Outcome.REFUSED and not has_progress:
        return NextAction(Action.GIVE_UP, last.reason)
    if num_without_progress and _is_same_refusal(attempts[-2:]):
        return NextAction(
            Action.GIVE_UP,
            f"the same error twice in a row without a new checkpoint: {last.reason}",
        )
    if num_without_progress > max_restarts:
        return NextAction(
            Action.GIVE_UP,
            f"{num_without_progress} attempts in a row made no new checkpoint; "
            f"the last: {last.reason}",
        )

    # only a new job can get other nodes
    if last.outcome == Outcome.BAD_NODES:
        return NextAction(Action.RESUBMIT, last.reason, tuple(excluded), num_without_progress)
    return NextAction(
        Action.REQUEUE if last.outcome == Outcome.STOPPED else Action.RESTART,
        last.reason,
        num_without_progress=num_without_progress,
    )


def _is_same_refusal(attempts: Sequence[Attempt]) -> bool:
    """True if two attempts of a submission met the same user error, which waiting does not mend."""
    return (
        len(attempts) == 2
        and attempts[0].submission == attempts[1].submission
        and attempts[0].outcome == attempts[1].outcome == Outcome.REFUSED
        and attempts[0].reason == attempts[1].reason
        and full_disk(attempts[0].reason) is None
    )


def _count_without_progress(attempts: Sequence[Attempt]) -> tuple[int, bool]:
    """Count the trailing attempts of the last submission that made no new checkpoint.

    Attempts that ended because nodes were excluded do not count: the number of nodes is finite, so
    this cannot repeat forever.

    Returns:
        The count, and whether any attempt of the last submission made progress.
    """
    num_without_progress = 0
    has_progress = False
    furthest = -1

    for attempt in attempts:
        if attempt.submission != attempts[-1].submission:
            num_without_progress = 0
            has_progress = False
        elif attempt.reached > max(furthest, attempt.checkpoint):
            num_without_progress = 0
            has_progress = True
        elif attempt.outcome != Outcome.BAD_NODES:
            num_without_progress += 1

        # includes earlier submissions: repeating their steps is no progress
        furthest = max(furthest, attempt.checkpoint, attempt.reached)

    return num_without_progress, has_progress
