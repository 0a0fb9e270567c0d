"""Entry point of the command `bitlm` and of `python -m bitlm_dist`."""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from bitlm_dist.launch.rank_info import RankInfo


TRACEBACK_VARIABLE = "BITLM_TRACEBACK"  # =1: errors of the operating system with their traceback
INTERRUPTED_EXIT_CODE = 130  # as in errors, whose import may be what was interrupted


def main() -> None:
    """Run the command line.

    An error that the user can fix is printed as one line on standard error, with exit code 2;
    errors of the operating system are among them. bitlm_dist/errors.py has the exit codes.
    """
    # Ctrl-C may come at any moment, also during the imports.
    try:
        from bitlm_dist.cpu_threads import set_cpu_environment
        from bitlm_dist.errors import filter_third_party_warnings

        # Both must precede the imports below: OpenMP reads its variables when torch is loaded.
        set_cpu_environment(os.environ)
        filter_third_party_warnings()
        code = _run()
    except KeyboardInterrupt:
        code = INTERRUPTED_EXIT_CODE

    # After the command's own line, if it had one to say: a prompt must not follow half a line.
    if code == INTERRUPTED_EXIT_CODE:
        print("\nbitlm: interrupted", file=sys.stderr, flush=True)
    _discard_unwritable_output()
    sys.exit(code)


def _run() -> int:
    """Run the command and report how it failed, if it did.

    Returns:
        The exit code, unless this rank has to exit at once or its traceback is to be seen.
    """
    from bitlm_dist import errors
    from bitlm_dist.cli import app
    from bitlm_dist.cli.console import prepare_terminal
    from bitlm_dist.launch.attempts import report_failure

    usage_error = _usage_error_class()
    ranks = _read_ranks()
    prepare_terminal()
    try:
        code = app(prog_name="bitlm", standalone_mode=False)
        # NCCL complains of a process group that is still open at exit.
        if (mesh := sys.modules.get("bitlm_dist.parallel.mesh")) is not None:
            mesh.destroy_process_groups()
        try:
            if sys.stdout is not None:  # it may be closed
                sys.stdout.flush()  # here, where a full disk is reported in one line
        except BrokenPipeError:
            return 1  # nobody reads on, which is no error to report; as click does while it prints
        return code if isinstance(code, int) else 0

    except (errors.UserError, usage_error) as error:
        message = error.format_message() if isinstance(error, usage_error) else str(error)  # type: ignore[attr-defined]
        if not message:  # a group without a command has printed its help
            return errors.USER_ERROR_EXIT_CODE
        report_failure(os.environ, ranks.rank, message, lost_peer=False, refused=True)
        errors.log_error_once_per_job(
            message if "\n" in message else f"bitlm: {message}", ranks.rank
        )
        return _exit_job(errors.USER_ERROR_EXIT_CODE, ranks.world_size)

    except errors.DivergedError as error:
        report_failure(
            os.environ, ranks.rank, str(error), lost_peer=False, refused=False, diverged=True
        )
        errors.log_error_once_per_job(f"bitlm: {error}", ranks.rank)
        return _exit_job(errors.DIVERGED_EXIT_CODE, ranks.world_size)

    except OSError as error:
        return _report_os_error(error, ranks)

    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        report_failure(
            os.environ, ranks.rank, words, lost_peer=errors.is_lost_peer_error(words), refused=False
        )
        if ranks.world_size == 1:
            raise
        errors.log_rank_failure(error, ranks.rank)
        _exit_immediately(1)


def _report_os_error(error: OSError, ranks: "RankInfo") -> int:
    """Print an error of the operating system as one line.

    On a launched rank it is a refusal only if a second try must fail as well: a network file
    system may be back after a restart. Then the traceback is in the rank's log, too.
    """
    from bitlm_dist import errors
    from bitlm_dist.launch.attempts import report_failure

    message = errors.os_error_message(error)
    refused = errors.is_permanent_os_error(error)
    report_failure(
        os.environ,
        ranks.rank,
        message,
        lost_peer=errors.is_lost_peer_error(message),
        refused=refused,
    )
    if os.environ.get(TRACEBACK_VARIABLE) == "1" or (ranks.world_size > 1 and not refused):
        errors.log_traceback(error)

    errors.log_error_once_per_job(f"bitlm: {message}", ranks.rank)
    return _exit_job(errors.USER_ERROR_EXIT_CODE, ranks.world_size)


def _discard_unwritable_output() -> None:
    """Flush standard output and error, so that the interpreter finds nothing to flush at exit.

    It would report what it cannot write once more, and change the exit code.
    """
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:  # it may be closed
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


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


def _exit_job(code: int, world_size: int) -> int:
    """Return ``code``, but exit now if this rank leaves others behind in a process group."""
    distributed = sys.modules.get("torch.distributed")
    if world_size > 1 and distributed is not None and distributed.is_initialized():
        _exit_immediately(code)
    return code


def _exit_immediately(code: int) -> NoReturn:
    """Exit without the interpreter's cleanup.

    The threads of a process group that other ranks have not left would keep the process alive.
    """
    _discard_unwritable_output()
    os._exit(code)


if __name__ == "__main__":
    main()
