"""The command `bitlm data`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitlm_dist.cli.console import AsJson, path_argument, print_line, print_table
from bitlm_dist.cli.progress import work_progress
from bitlm_dist.formatting import plural
from bitlm_dist.strict_json import to_json

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
    as_json: AsJson = False,
) -> None:
    """Verify the hashes of a prepared folder.

    Exit code 1: a file is damaged, missing or does not belong to the folder.
    """
    results = _verify_files(folder)
    damage = [problem for _, problems in results.values() for problem in problems]
    token_bytes = _write_token_bytes(folder) if write and not damage else None

    if as_json:
        files = {
            what: {"number": count, "problems": problems}
            for what, (count, problems) in results.items()
        }
        record = {"folder": str(folder), "whole": not damage, "files": files}
        print(to_json(record | ({"token_bytes": token_bytes} if token_bytes else {}), indent=1))
    else:
        _print_status(folder, results)
        if token_bytes:
            _print_token_bytes(token_bytes)

    if damage:
        raise typer.Exit(1)


def _verify_files(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Number and problems of each kind of files."""
    from bitlm_dist.data.manifest import SPLITS, damaged_files, read_manifest
    from bitlm_dist.data.shards import damaged_shards

    manifest = read_manifest(folder)
    with work_progress("hashing small files"):
        problems = damaged_files(folder, manifest)
    results = {"tokenizer, indices, statistics": (len(manifest["files"]), problems)}

    for split in (split for split in SPLITS if manifest["splits"][split]["documents"]):
        with work_progress(f"hashing shards, {split}"):
            results[f"shards, {split}"] = damaged_shards(folder, manifest, split)
    return results


def _print_status(folder: Path, results: dict[str, tuple[int, list[str]]]) -> None:
    rows = (
        (what, f"{count:,}", f"{len(problems):,} not whole" if problems else "whole")
        for what, (count, problems) in results.items()
    )
    print_table(str(folder), ("files", "number", "status"), rows)

    # One line per problem: a path that a narrow table folds can be neither copied nor searched for.
    for _, problems in results.values():
        for problem in problems:
            print_line(problem)


def _write_token_bytes(folder: Path) -> dict[str, Any]:
    """Add the bytes of all tokens to the manifest, and return what it says of them."""
    from bitlm_dist.data_prep.recount import write_token_bytes

    with work_progress("counting the bytes of all tokens"):
        manifest = write_token_bytes(folder)

    splits = {
        split: {name: sizes[name] for name in ("token_bytes", "bytes")}
        for split, sizes in manifest["splits"].items()
    }
    return {"splits": splits, "lossless": manifest["round_trip"]["lossless"]}


def _print_token_bytes(token_bytes: dict[str, Any]) -> None:
    for split, sizes in token_bytes["splits"].items():
        print_line(
            f"{split}: the tokens stand for {plural(sizes['token_bytes'], 'byte')}, "
            f"the text had {sizes['bytes']:,}"
        )
    if not token_bytes["lossless"]:
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

    with work_progress("copying"):
        mirror(url, folder)
    print_line(
        f"{folder}: train on it with --data.path {folder}, "
        "and --data.cache DIR to keep the streamed shards"
    )
