"""The one exception that speaks to users."""

import warnings


class UserError(ValueError):
    """Something the user can mend: the message is one line that names the key or file and the remedy. The command exits with 2."""


def silence_announcements() -> None:
    """Keep Megatron-core and streaming from announcing at every import what they would do on a GPU; `bitlm doctor` says it once."""
    warnings.filterwarnings("ignore", module=r"(megatron|streaming|torch\.distributed|pynvml)\b")
