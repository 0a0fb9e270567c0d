"""The manifest of a prepared folder: manifest.json, which `bitlm prep` writes last."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitlm_dist.errors import UserError
from bitlm_dist.files import sha256_of
from bitlm_dist.paths import relative_to_note

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
SPLITS = ("train", "validation")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a prepared folder.

    Raises:
        UserError: The folder is missing, empty, of another version, or was not prepared to the end.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"data.path = {folder} is a file: name the folder that `bitlm prep` wrote")
    if not folder.is_dir():
        where = f"{folder}{relative_to_note(folder)}"
        raise UserError(
            f"data.path = {where} does not exist: "
            f"prepare it with `bitlm prep FILE --tokenizer T --out {folder}`"
        )

    # `bitlm prep` writes settings.json first and the manifest last.
    file = folder / MANIFEST
    if not file.is_file():
        state = (
            "is not finished: run the same"
            if (folder / "settings.json").is_file()
            else "holds no shards: run"
        )
        raise UserError(
            f"data.path = {folder} {state} `bitlm prep … --out {folder}` (no {MANIFEST})"
        )

    try:
        manifest = json.loads(file.read_text())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(
            f"{file} is damaged: restore it, or remove it and run the same `bitlm prep` again"
        )

    if manifest.get("version") != MANIFEST_VERSION:
        raise UserError(
            f"data.path = {folder} has version {manifest.get('version')}, "
            f"this bitlm reads {MANIFEST_VERSION}: prepare the data again into a new folder"
        )
    return manifest


def damaged_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """List the problems of all files whose hashes the manifest holds."""
    problems = []
    for name in manifest["files"]:
        try:
            check_file(folder, manifest, name)
        except UserError as error:
            # Without the remedy, which follows the colon and is the same for all of them.
            problems.append(str(error).partition(":")[0])
    return problems


def check_file(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Check a file of a prepared folder against its hash in the manifest.

    Raises:
        UserError: The file is missing or differs from the one that was hashed.
    """
    file = folder / name
    if not file.is_file():
        raise UserError(f"{file} is missing: restore it or prepare the data again")
    if sha256_of(file) != manifest["files"].get(name):
        raise UserError(
            f"{file} is damaged, or not the one that {folder / MANIFEST} was written for: "
            "restore it or prepare again"
        )
