"""Paths as users write them: expanded where they are read, absolute where they are stored."""

import os
import re
from pathlib import Path

from bitlm_dist.errors import UserError

HERE_VARIABLE = "${here}"  # in a YAML file, at the start of a path: the folder that holds the file
_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{([^}]*)\})")


def expand_path(text: str, here: Path | None = None) -> str:
    """Expand ``~`` and ``${here}`` at the start, ``$VAR`` and ``${VAR}`` anywhere, ``$$`` to ``$``.

    Args:
        text: the path as written.
        here: folder of the file that contains the path; None if it does not come from a file.

    Raises:
        UserError: a variable is not set or there is no such user. The message does not say where
            the path was written, which the caller knows.
    """

    def value(found: re.Match[str]) -> str:
        """The replacement of a match: a dollar sign, or the value of the variable."""
        dollar = found[1]
        name = found[2] or found[3]
        if not dollar and name not in os.environ:
            raise UserError(
                f"the variable {found[0]} is not set: set it, or write $$ for a dollar sign"
            )
        return dollar or os.environ[name]

    # The folder itself is not expanded: its name may contain a dollar sign.
    if here is not None and (text == HERE_VARIABLE or text.startswith(f"{HERE_VARIABLE}/")):
        return str(absolute_path(here)) + _VARIABLE.sub(value, text[len(HERE_VARIABLE) :])

    if text.startswith("~"):
        user, slash, rest = text.partition("/")
        home = os.path.expanduser(user)
        if home == user:
            raise UserError(
                f"there is no home folder {user}: write the path in full, "
                f"or ./{text} for a file of that name"
            )
        return home + slash + _VARIABLE.sub(value, rest)

    return _VARIABLE.sub(value, text)


def escape_path(path: Path) -> str:
    """The inverse of :func:`expand_path` for an absolute path."""
    return str(path).replace("$", "$$")


def absolute_path(path: Path) -> Path:
    """Make a path absolute. Links are resolved only if the path contains ``..``."""
    # the parent of a link's target is not the parent of the link
    return Path(os.path.realpath(path)) if ".." in path.parts else path.absolute()


def relative_to_note(path: Path) -> str:
    """Note for messages, right after a path: the folder that it is relative to.

    Returns:
        An empty string for an absolute path.
    """
    return "" if path.is_absolute() else f" (from {Path.cwd()})"


def check_absent(path: Path) -> None:
    """Raise a :class:`UserError` if something is where a folder is to be made."""
    if path.exists():
        raise UserError(f"{path} exists: name a folder that does not")
