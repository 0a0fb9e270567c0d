"""Paths as users write them: expanded where they are read, absolute where they are stored."""

import os
import re
from pathlib import Path

from bitlm_dist.errors import UserError

HERE = "${here}"  # in a YAML file, at the start of a path: the folder that holds the file
_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{([^}]*)\})")


def expanded(text: str, here: Path | None = None) -> str:
    """Replace ``~`` and ``${here}`` at the start, ``$VAR`` and ``${VAR}`` anywhere, and ``$$`` by ``$``.

    Args:
        text: as it was written.
        here: folder of the file that holds it; None: it stands in no file.

    Raises:
        UserError: a variable is not set or there is no such user; without a place, which the caller knows.
    """

    def value(found: re.Match[str]) -> str:
        dollar, name = found[1], found[2] or found[3]
        if not dollar and name not in os.environ:
            raise UserError(f"the variable {found[0]} is not set: set it, or write $$ for a dollar sign")
        return dollar or os.environ[name]

    if here is not None and (text == HERE or text.startswith(f"{HERE}/")):
        return str(absolute(here)) + _VARIABLE.sub(value, text[len(HERE) :])

    if text.startswith("~"):
        user, slash, rest = text.partition("/")
        home = os.path.expanduser(user)
        if home == user:
            raise UserError(f"there is no home folder {user}: write the path in full, or ./{text} for a file of that name")
        return home + slash + _VARIABLE.sub(value, rest)
    return _VARIABLE.sub(value, text)


def escaped(path: Path) -> str:
    """The text that :func:`expanded` reads as this absolute path."""
    return str(path).replace("$", "$$")


def absolute(path: Path) -> Path:
    """The path from the root. Links stay as they are, unless ``..`` would take its meaning from them."""
    return Path(os.path.realpath(path)) if ".." in path.parts else path.absolute()


def seen_from(path: Path) -> str:
    """Say which folder a relative path starts from; empty for an absolute one. For messages, right behind the path."""
    return "" if path.is_absolute() else f" (from {Path.cwd()})"
