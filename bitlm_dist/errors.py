"""The one exception that speaks to users."""


class UserError(ValueError):
    """Something the user can mend: the message is one line that names the key or file and the remedy. The command exits with 2."""
