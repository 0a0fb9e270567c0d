"""The command `bitlm data`."""

from pathlib import Path
from typing import Annotated

import typer

from bitlm_dist.cli.console import path_argument, print_line, print_table

data_app = typer.Typer(no_args_is_help=True, help="Verify and mirror prepared folders.")
Folder = Annotated[Path, path_argument("DIR", "Prepared folder.")]


@data_app.command("verify")
def verify_command(
    folder: Folder,
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Also add the bytes of all tokens to the manifest, for folders of older versions.",
        ),
    ] = False,
) -> None:
    """Verify the hashes of a prepared folder.

    Exit code 1: a file is damaged, missing or does not belong to the folder.
    """
    from bitlm_dist.data.manifest import SPLITS, damaged_files, read_manifest
    from bitlm_dist.data.shards import damaged_shards

    manifest = read_manifest(folder)
    results = {
        "tokenizer, indices, statistics": (len(manifest["files"]), damaged_files(folder, manifest))
    }
    for split in (split for split in SPLITS if manifest["splits"][split]["documents"]):
        results[f"shards, {split}"] = damaged_shards(folder, manifest, split)

    rows = (
        (what, count, f"{len(problems)} not whole" if problems else "whole")
        for what, (count, problems) in results.items()
    )
    print_table(str(folder), ("files", "number", "status"), rows)

    # One line per problem: a path that a narrow table folds can be neither copied nor searched for.
    damage = [problem for _, problems in results.values() for problem in problems]
    for problem in damage:
        print_line(problem)
    if damage:
        raise typer.Exit(1)

    if write:
        _write_token_bytes(folder)


def _write_token_bytes(folder: Path) -> None:
    from bitlm_dist.data_prep.recount import write_token_bytes

    manifest = write_token_bytes(folder)
    for split, sizes in manifest["splits"].items():
        print_line(
            f"{split}: the tokens stand for {sizes['token_bytes']:,} bytes, "
            f"the text had {sizes['bytes']:,}"
        )
    if not manifest["round_trip"]["lossless"]:
        print_line(
            "warning: the tokens do not give the text back; "
            "bits per byte will be marked as approximate"
        )


@data_app.command("mirror")
def mirror_command(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="Remote prepared folder: s3://bucket/data, gs://…, https://…"
        ),
    ],
    folder: Annotated[Path, path_argument("DIR", "Folder to create; must not exist.")],
) -> None:
    """Copy the small files of a remote prepared folder.

    Its shards are streamed when training reads them.
    """
    from bitlm_dist.data.remote import mirror

    mirror(url, folder)
    print_line(
        f"{folder}: train on it with --data.path {folder}, "
        "and --data.cache DIR to keep the streamed shards"
    )
