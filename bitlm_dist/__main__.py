"""Entry of the command `bitlm` and of `python -m bitlm_dist`."""

import os
import sys


def main() -> None:
    """Run the command line; what the user can mend is one line on standard error and exit code 2."""
    from bitlm_dist.errors import UserError, say_failure, say_once, silence_announcements

    silence_announcements()
    import typer

    from bitlm_dist.cli import app

    # typer carries a click of its own, so the class of its errors is found through one that it exports
    usage_error: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        code = app(prog_name="bitlm", standalone_mode=False)
    except (UserError, usage_error) as error:
        message = error.format_message() if isinstance(error, usage_error) else str(error)  # type: ignore[attr-defined]
        say_once(message if "\n" in message else f"bitlm: {message}")
        sys.exit(2)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1) or 1) == 1:
            raise
        say_failure(error)
        os._exit(1)  # threads of a broken process group would keep it alive
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
