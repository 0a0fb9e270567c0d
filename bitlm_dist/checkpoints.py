"""The command `bitlm checkpoint`."""

from dataclasses import asdict
from datetime import datetime
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from bitlm_dist.errors import UserError
from bitlm_dist.files import to_json
from bitlm_dist.paths import seen_from
from bitlm_dist.terminal import AsJson, Run, path_argument, say, show_table

checkpoints = typer.Typer(no_args_is_help=True, help="Look at the checkpoints of a run, compare them, take weights out and in.")
Checkpoint = Annotated[Path, path_argument("RUN|CHECKPOINT", "Run folder (its newest checkpoint) or step folder.")]
SHOWN = 10  # tensors that differ most
HEALTH = {True: "yes", False: "NO", None: "not known yet"}


@checkpoints.command("list")
def list_command(run: Run, as_json: AsJson = False) -> None:
    """Every complete checkpoint, oldest first; nothing is rehashed. Healthy: loss and norm were finite in its step and the next."""
    from bitlm_dist.checkpoint.store import describe

    rows: list[dict[str, Any]] = []
    for folder in _folders(run):
        try:
            rows.append(describe(folder))
        except UserError as error:
            rows.append({"folder": str(folder), "problem": str(error)})
    if as_json:
        print(to_json(rows, indent=1))
        return
    columns = ("checkpoint", "tokens", "MiB", "saved", "healthy")
    show_table(str(run), columns, (_line(row) for row in rows if "problem" not in row))
    for row in rows:
        if "problem" in row:
            say(row["problem"])


@checkpoints.command("verify")
def verify_command(run: Checkpoint) -> None:
    """Hash every file again, of a checkpoint or of all of a run; exit code 1 if one is damaged or missing."""
    from bitlm_dist.checkpoint.store import MANIFEST, verify

    found = []
    for folder in [run] if (run / MANIFEST).is_file() else _folders(run):
        try:
            verify(folder)
        except UserError as error:
            found.append((folder.name, "damaged", str(error)))
        else:
            found.append((folder.name, "whole", ""))
    show_table("", ("checkpoint", "is", "what to do"), found)
    if any(state == "damaged" for _, state, _ in found):
        raise typer.Exit(1)


@checkpoints.command("diff")
def diff_command(first: Checkpoint, second: Checkpoint, as_json: AsJson = False) -> None:
    """Compare two checkpoints: weights, optimizer, step and config, whatever layout wrote them; exit code 1: they differ."""
    from bitlm_dist.checkpoint.diff import compare, compare_states

    folders = _one(first), _one(second)
    counts, differences = compare(*folders)
    states = compare_states(*folders)
    if as_json:
        listed = [{key: None if value == inf else value for key, value in asdict(d).items()} for d in differences]
        print(to_json({"tensors": counts, "differences": listed, "state": states}, indent=1))
    else:
        kinds = []
        for kind, count in counts.items():
            those = [d for d in differences if d.kind == kind]
            largest, relative = (max((getattr(d, key) for d in those), default=0.0) for key in ("largest", "relative"))
            kinds.append((kind, count, len(those), f"{largest:.3g}", f"{relative:.3g}"))
        columns = ("", "tensors", "differ", "largest difference", "largest relative difference")
        show_table(f"{folders[0]} and {folders[1]}", columns, kinds)
        if differences:
            top = differences[:SHOWN]
            rows = ((d.name, d.note or f"{d.largest:.3g}", f"{d.relative:.3g}") for d in top)
            show_table(f"the {len(top)} that differ most", ("tensor", "largest difference", "relative"), rows)
        if states:
            show_table("what else differs", ("", "first", "second"), ((key, *values) for key, values in states.items()))
    if differences or states:
        raise typer.Exit(1)


@checkpoints.command("export")
def export_command(
    checkpoint: Checkpoint,
    out: Annotated[Path, path_argument("OUT", "Folder to write; must not exist.")],
    averaged: Annotated[bool, typer.Option("--averaged", help="The moving average of the weights (optimizer.ema).")] = False,
    file_gb: Annotated[float, typer.Option(min=0.001, help="Largest file, in GB.")] = 4.0,
) -> None:
    """Write the weights as safetensors, with config, tokenizer and codes; one tensor in memory at a time."""
    from bitlm_dist.training.export import export

    if not isfinite(file_gb):
        raise UserError(f"--file-gb {file_gb}: expected a number of gigabytes, e.g. 4")
    folder = _one(checkpoint)
    size = export(folder, out, averaged, int(file_gb * 1e9))
    say(f"{out}: {size / 2**20:,.1f} MiB of weights from {folder}")


@checkpoints.command("import")
def import_command(
    source: Annotated[Path, path_argument("FOLDER", "What `bitlm checkpoint export` wrote.")],
    run: Annotated[Path, path_argument("RUN", "Run folder to make; must not exist.")],
) -> None:
    """Make a run folder of exported weights, for `bitlm eval` and `bitlm generate`."""
    from bitlm_dist.training.export import import_

    import_(source, run)
    say(f"{run}: evaluate it with `bitlm eval {run}`")


def _folders(run: Path) -> list[Path]:
    from bitlm_dist.checkpoint.store import folder_of
    from bitlm_dist.training.checkpoint_place import CHECKPOINTS, steps_of

    steps, root = steps_of(run), run / CHECKPOINTS
    if not root.is_dir():
        raise UserError(f"{run}{seen_from(run)} is no run folder: it holds no checkpoints/")
    return [folder_of(root, step) for step in steps]


def _one(path: Path) -> Path:
    """The checkpoint that a path names."""
    from bitlm_dist.checkpoint.store import MANIFEST, read_manifest

    if not (path / MANIFEST).is_file():
        folders = _folders(path)
        if not folders:
            raise UserError(f"{path} holds no checkpoint yet")
        path = folders[-1]
    read_manifest(path)
    return path


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    saved = datetime.fromtimestamp(row["saved"]).strftime("%Y-%m-%d %H:%M:%S")
    return Path(row["folder"]).name, f"{row['tokens']:,}", f"{row['bytes'] / 2**20:,.1f}", saved, HEALTH[row["healthy"]]
