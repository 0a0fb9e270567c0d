"""Entry point of the command `bitlm` and of `python -m bitlm_dist`."""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from bitlm_dist.launch.rank_info import RankInfo


def main() -> None:
    """Run the command line.

    An error that the user can fix is printed as one line on standard error, with exit code 2.
    Exit code 3 means that training diverged.
    """
    from bitlm_dist.cpu_threads import set_cpu_environment
    from bitlm_dist.errors import (
        DIVERGED_EXIT_CODE,
        DivergedError,
        UserError,
        filter_third_party_warnings,
        is_lost_peer_error,
        log_error_once_per_job,
        log_rank_failure,
    )

    # Both must precede the imports below: OpenMP reads its variables when torch is loaded.
    set_cpu_environment(os.environ)
    filter_third_party_warnings()
    from bitlm_dist.cli import app
    from bitlm_dist.launch.attempts import report_failure

    usage_error = _usage_error_class()
    ranks = _read_ranks()
    try:
        code = app(prog_name="bitlm", standalone_mode=False)
        # NCCL complains of a process group that is still open at exit.
        if (mesh := sys.modules.get("bitlm_dist.parallel.mesh")) is not None:
            mesh.destroy_process_groups()

    except (UserError, usage_error) as error:
        message = error.format_message() if isinstance(error, usage_error) else str(error)  # type: ignore[attr-defined]
        report_failure(os.environ, ranks.rank, message, lost_peer=False, refused=True)
        log_error_once_per_job(message if "\n" in message else f"bitlm: {message}", ranks.rank)
        _exit_job(2, ranks.world_size)

    except DivergedError as error:
        report_failure(
            os.environ, ranks.rank, str(error), lost_peer=False, refused=False, diverged=True
        )
        log_error_once_per_job(f"bitlm: {error}", ranks.rank)
        _exit_job(DIVERGED_EXIT_CODE, ranks.world_size)

    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        report_failure(
            os.environ, ranks.rank, words, lost_peer=is_lost_peer_error(words), refused=False
        )
        if ranks.world_size == 1:
            raise
        log_rank_failure(error, ranks.rank)
        _exit_immediately(1)

    sys.exit(code if isinstance(code, int) else 0)


def _usage_error_class() -> type[Exception]:
    """The base class of typer's usage errors.

    Typer bundles its own click, so the class is found through one that typer exports.
    """
    import typer

    return next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _read_ranks() -> "RankInfo":
    """Rank information from the environment; a single process if it is invalid."""
    from bitlm_dist.errors import UserError
    from bitlm_dist.launch.rank_info import RankInfo, read_rank_info

    try:
        return read_rank_info(os.environ)
    except UserError:  # reported by the command that needs it
        return RankInfo(0, 1, 0)


def _exit_job(code: int, world_size: int) -> NoReturn:
    """Exit with ``code``, immediately if this rank leaves others behind in a process group."""
    distributed = sys.modules.get("torch.distributed")
    if world_size > 1 and distributed is not None and distributed.is_initialized():
        _exit_immediately(code)
    sys.exit(code)


def _exit_immediately(code: int) -> NoReturn:
    """Exit without the interpreter's cleanup.

    The threads of a process group that other ranks have not left would keep the process alive.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
