"""The command `bitlm data`."""

from pathlib import Path
from typing import Annotated

import typer

from bitlm_dist.terminal import say, show_table

prepared = typer.Typer(no_args_is_help=True, help="Look after folders that `bitlm prep` wrote.")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Prepared folder.")]


@prepared.command("verify")
def verify_command(folder: Folder) -> None:
    """Hash every shard again; exit code 1 if one is damaged, missing or not of this folder."""
    from bitlm_dist.data.shards import SPLITS, damaged_shards, read_manifest

    manifest = read_manifest(folder)
    rows, bad = [], 0
    for split in (split for split in SPLITS if manifest["splits"][split]["documents"]):
        count, problems = damaged_shards(folder, split)
        rows.append((split, count, "whole" if not problems else "; ".join(problems)))
        bad += len(problems)
    show_table(str(folder), ("split", "shards", "are"), rows)
    if bad:
        raise typer.Exit(1)


@prepared.command("mirror")
def mirror_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="Prepared folder in an object store, e.g. s3://bucket/data.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; must not exist.")],
) -> None:
    """Copy the small files of a prepared folder; its shards are streamed from the store when training reads them."""
    from bitlm_dist.data.remote import mirror
    from bitlm_dist.data.shards import SPLITS

    mirror(url, folder, SPLITS)
    say(f"{folder}: train on it with --data.path {folder}, and --data.cache DIR to keep what is streamed")
