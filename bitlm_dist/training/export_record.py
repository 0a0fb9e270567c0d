"""The record of an exported folder. Imports no torch, as the command line looks at it first."""

import json
from pathlib import Path
from typing import Any

from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.files import sha256_of

EXPORT_FORMAT = 1
EXPORT_RECORD = "export.json"


def read_export_record(source: Path) -> dict[str, Any]:
    """Read the record of an exported folder.

    Raises:
        UserError: ``source`` is not an exported folder, or of a newer format.
    """
    try:
        record: dict[str, Any] = json.loads((source / EXPORT_RECORD).read_text())
        format_version = int(record["format"])
        dict(record["files"])
    except OSError as error:
        raise UserError(
            f"{source} is not an exported folder: {EXPORT_RECORD} cannot be read: "
            f"{os_error_message(error)}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{source} is not an exported folder: {EXPORT_RECORD} in it is of another program, "
            "or damaged"
        ) from None

    # a newer format may list its files in another way
    if format_version > EXPORT_FORMAT:
        raise UserError(
            f"{source} has export format {format_version}, this version reads up to "
            f"{EXPORT_FORMAT}: upgrade bitlm-dist"
        )
    return record


def load_verified_record(source: Path) -> dict[str, Any]:
    """Read the record of an exported folder, and verify all files that it lists.

    Raises:
        UserError: as :func:`read_export_record`, or a file is missing or damaged.
    """
    record = read_export_record(source)
    for name, expected in record["files"].items():
        file = source / name
        if not file.is_file():
            raise UserError(f"{file} is missing: export again")
        if sha256_of(file) != expected["sha256"]:
            raise UserError(f"{file} is damaged: export again")

    return record
