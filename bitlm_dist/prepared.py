"""The command `bitlm data`."""

from pathlib import Path
from typing import Annotated

import typer

from bitlm_dist.terminal import path_argument, say, show_table

prepared = typer.Typer(no_args_is_help=True, help="Look after folders that `bitlm prep` wrote.")
Folder = Annotated[Path, path_argument("DIR", "Prepared folder.")]


@prepared.command("verify")
def verify_command(
    folder: Folder,
    write: Annotated[
        bool, typer.Option("--write", help="Count the bytes of all tokens too and write them to the manifest, for older folders.")
    ] = False,
) -> None:
    """Hash every file again; exit code 1 if one is damaged, missing or not of this folder."""
    from bitlm_dist.data.manifest import SPLITS, damaged_files, read_manifest
    from bitlm_dist.data.shards import damaged_shards

    manifest = read_manifest(folder)
    found = {"tokenizer, indices, statistics": (len(manifest["files"]), damaged_files(folder, manifest))}
    for split in (split for split in SPLITS if manifest["splits"][split]["documents"]):
        found[f"shards, {split}"] = damaged_shards(folder, manifest, split)
    rows = ((what, count, f"{len(problems)} not whole" if problems else "whole") for what, (count, problems) in found.items())
    show_table(str(folder), ("files", "number", "are"), rows)

    damage = [problem for _, problems in found.values() for problem in problems]
    for problem in damage:
        say(problem)  # a line each: a path that a narrow table folds can be neither copied nor searched for
    if damage:
        raise typer.Exit(1)
    if write:
        _write_token_bytes(folder)


def _write_token_bytes(folder: Path) -> None:
    from bitlm_dist.data_prep.recount import write_token_bytes

    manifest = write_token_bytes(folder)
    for split, sizes in manifest["splits"].items():
        say(f"{split}: the tokens stand for {sizes['token_bytes']:,} bytes, the text had {sizes['bytes']:,}")
    if not manifest["round_trip"]["lossless"]:
        say("warning: the tokens do not give the text back; bits per byte will be marked as approximate")


@prepared.command("mirror")
def mirror_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="Prepared folder elsewhere: s3://bucket/data, gs://…, https://…")],
    folder: Annotated[Path, path_argument("DIR", "Folder to make; must not exist.")],
) -> None:
    """Copy the small files of a prepared folder; its shards are streamed when training reads them."""
    from bitlm_dist.data.remote import mirror

    mirror(url, folder)
    say(f"{folder}: train on it with --data.path {folder}, and --data.cache DIR to keep what is streamed")
