"""Entry of the command `bitlm` and of `python -m bitlm_dist`."""

import sys
import warnings


def main() -> None:
    """Run the command line; a :class:`~bitlm_dist.errors.UserError` is one line on standard error and exit code 2."""
    # Megatron-core and streaming announce at every import what they would do on a GPU; `bitlm doctor` says it once.
    warnings.filterwarnings("ignore", module=r"(megatron|streaming|torch\.distributed|pynvml)\b")
    from bitlm_dist.cli import app
    from bitlm_dist.errors import UserError

    try:
        app(prog_name="bitlm")
    except UserError as error:
        print(f"bitlm: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
