"""The command `bitlm checkpoint`."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from bitlm_dist.errors import UserError
from bitlm_dist.terminal import AsJson, Run, show_table

checkpoints = typer.Typer(no_args_is_help=True, help="Look at the checkpoints of a run.")


@checkpoints.command("list")
def list_command(run: Run, as_json: AsJson = False) -> None:
    """Every complete checkpoint, oldest first; nothing is rehashed."""
    from bitlm_dist.checkpoint.store import describe

    rows = [describe(folder) for folder in _folders(run)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    show_table("", ("step", "tokens", "MiB", "saved", "folder"), (_line(row) for row in rows))


@checkpoints.command("verify")
def verify_command(run: Run) -> None:
    """Hash every file again; exit code 1 if one is damaged or missing."""
    from bitlm_dist.checkpoint.store import read_state

    found = []
    for folder in _folders(run):
        try:
            read_state(folder)
        except UserError as error:
            found.append((folder.name, "damaged", str(error)))
        else:
            found.append((folder.name, "whole", ""))
    show_table("", ("checkpoint", "is", "what to do"), found)
    if any(state == "damaged" for _, state, _ in found):
        raise typer.Exit(1)


def _folders(run: Path) -> list[Path]:
    from bitlm_dist.checkpoint.store import complete_steps, folder_of
    from bitlm_dist.training.run_folder import RunFolder

    root = RunFolder(run).checkpoints
    if not root.is_dir():
        raise UserError(f"{run} is no run folder: it holds no checkpoints/")
    return [folder_of(root, step) for step in complete_steps(root)]


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    saved = datetime.fromtimestamp(row["saved"]).strftime("%Y-%m-%d %H:%M:%S")
    return row["step"], f"{row['tokens']:,}", f"{row['bytes'] / 2**20:,.1f}", saved, row["folder"]
