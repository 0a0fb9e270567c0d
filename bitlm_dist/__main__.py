"""Entry of the command `bitlm` and of `python -m bitlm_dist`."""

import os
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line.

    An error that the user can fix is one line on standard error and exit code 2; exit code 3 says that training diverged.
    """
    from bitlm_dist.cpu_threads import set_cpu_environment
    from bitlm_dist.errors import DIVERGED, DivergedError, UserError, only_lost_peer, say_failure, say_once, silence_announcements

    set_cpu_environment(os.environ)
    silence_announcements()
    import typer

    from bitlm_dist.cli import app
    from bitlm_dist.launch.attempts import report_failure
    from bitlm_dist.launch.ranks import Ranks, read_ranks

    # typer carries a click of its own, so the class of its errors is found through one that it exports
    usage_error: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        ranks = read_ranks(os.environ)
    except UserError:  # the command that needs them says so
        ranks = Ranks(0, 1, 0)
    try:
        code = app(prog_name="bitlm", standalone_mode=False)
        if (mesh := sys.modules.get("bitlm_dist.parallel.mesh")) is not None:
            mesh.close()  # or NCCL complains of a process group that was left to itself
    except (UserError, usage_error) as error:
        message = error.format_message() if isinstance(error, usage_error) else str(error)  # type: ignore[attr-defined]
        report_failure(os.environ, ranks.rank, message, lost_peer=False, refused=True)
        say_once(message if "\n" in message else f"bitlm: {message}", ranks.rank)
        _end(2, ranks.world)
    except DivergedError as error:
        report_failure(os.environ, ranks.rank, str(error), lost_peer=False, refused=False, diverged=True)
        say_once(f"bitlm: {error}", ranks.rank)
        _end(DIVERGED, ranks.world)
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        report_failure(os.environ, ranks.rank, words, lost_peer=only_lost_peer(words), refused=False)
        if ranks.world == 1:
            raise
        say_failure(error, ranks.rank)
        _end_at_once(1)
    sys.exit(code if isinstance(code, int) else 0)


def _end(code: int, world: int) -> NoReturn:
    """End with an exit code, at once if this rank leaves others in a process group."""
    distributed = sys.modules.get("torch.distributed")
    if world > 1 and distributed is not None and distributed.is_initialized():
        _end_at_once(code)
    sys.exit(code)


def _end_at_once(code: int) -> NoReturn:
    """Without the rest: threads of a process group that others have not left would keep the process alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
