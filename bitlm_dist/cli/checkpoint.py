"""The command `bitlm checkpoint`."""

from dataclasses import asdict
from datetime import datetime
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlm_dist.cli.console import AsJson, Run, path_argument, print_line, print_table
from bitlm_dist.cli.progress import work_progress
from bitlm_dist.config_loading import value_as_yaml
from bitlm_dist.errors import UserError
from bitlm_dist.paths import check_absent, relative_to_note
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.checkpoint.diff import Difference

checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="Inspect and compare the checkpoints of a run, export and import weights.",
)
CheckpointPath = Annotated[
    Path,
    path_argument("RUN|CHECKPOINT", "Run folder (its latest checkpoint) or checkpoint folder."),
]
NUM_SHOWN = 10  # tensors in the list of largest differences
HEALTH_LABELS = {True: "yes", False: "NO", None: "not known yet"}


@checkpoint_app.command("list")
def list_command(run: Run, as_json: AsJson = False) -> None:
    """List the complete checkpoints of a run, oldest first, without hashing them.

    Healthy: loss and gradient norm were finite in its step and the next.
    """
    from bitlm_dist.checkpoint.store import checkpoint_summary

    rows: list[dict[str, Any]] = []
    for folder in _checkpoint_folders(run):
        try:
            rows.append(checkpoint_summary(folder))
        except UserError as error:
            rows.append({"folder": str(folder), "problem": str(error)})
    if as_json:
        print(to_json(rows, indent=1))
        return

    # A line per damaged checkpoint, below the table: its message has no columns.
    columns = ("checkpoint", "tokens", "MiB", "saved", "healthy")
    print_table(str(run), columns, (_table_row(row) for row in rows if "problem" not in row))
    for row in rows:
        if "problem" in row:
            print_line(row["problem"])


@checkpoint_app.command("verify")
def verify_command(
    run: Annotated[
        Path,
        path_argument("RUN|CHECKPOINT", "Run folder (all its checkpoints) or checkpoint folder."),
    ],
    as_json: AsJson = False,
) -> None:
    """Verify the hashes of a checkpoint, or of all checkpoints of a run.

    Exit code 1: a file is damaged or missing.
    """
    from bitlm_dist.checkpoint.steps import MANIFEST
    from bitlm_dist.checkpoint.store import verify

    # a folder with a manifest is a checkpoint, any other a run
    folders = [run] if (run / MANIFEST).is_file() else _checkpoint_folders(run)
    if not folders:
        raise UserError(f"{run} holds no checkpoint yet")

    problems: dict[Path, str | None] = dict.fromkeys(folders)
    with work_progress("hashing", len(folders), "checkpoints") as advance:
        for number, folder in enumerate(folders, 1):
            try:
                verify(folder)
            except UserError as error:
                problems[folder] = str(error)
            advance(number)

    if as_json:
        records = [
            {"folder": str(folder), "whole": problem is None, "problem": problem}
            for folder, problem in problems.items()
        ]
        print(to_json({"run": str(run), "checkpoints": records}, indent=1))
    else:
        rows = ((f.name, "damaged" if problem else "whole") for f, problem in problems.items())
        print_table("", ("checkpoint", "status"), rows)
        # below the table, as a path that it folds can be neither copied nor searched for
        for problem in filter(None, problems.values()):
            print_line(problem)

    if any(problems.values()):
        raise typer.Exit(1)


@checkpoint_app.command("diff")
def diff_command(first: CheckpointPath, second: CheckpointPath, as_json: AsJson = False) -> None:
    """Compare two checkpoints: weights, optimizer state, step and config.

    The layouts that wrote them may differ. Exit code 1: the checkpoints differ.
    """
    folders = _resolve_checkpoint(first), _resolve_checkpoint(second)
    with work_progress("comparing tensors"):
        # after the look at the folders, as it loads torch
        from bitlm_dist.checkpoint.diff import compare_tensors, compare_train_states

        counts, differences = compare_tensors(*folders)
    states = compare_train_states(*folders)

    if as_json:
        # a tensor that one side lacks differs by infinity, which JSON cannot represent
        listed = [
            {key: None if value == inf else value for key, value in asdict(d).items()}
            for d in differences
        ]
        print(to_json({"tensors": counts, "differences": listed, "state": states}, indent=1))
    else:
        _print_tensor_differences(folders, counts, differences)
        if states:
            print_table(
                "other differences",
                ("", "first", "second"),
                ((key, *map(value_as_yaml, values)) for key, values in states.items()),
            )

    if differences or states:
        raise typer.Exit(1)


def _print_tensor_differences(
    folders: tuple[Path, Path], counts: dict[str, int], differences: "list[Difference]"
) -> None:
    """Print a table by kind of tensor, then the tensors with the largest differences."""
    rows_by_kind = []
    for kind, count in counts.items():
        of_this_kind = [d for d in differences if d.slot == kind]
        largest, relative = (
            max((getattr(d, key) for d in of_this_kind), default=0.0)
            for key in ("largest", "relative")
        )
        rows_by_kind.append((kind, count, len(of_this_kind), f"{largest:.3g}", f"{relative:.3g}"))

    columns = ("", "tensors", "differ", "largest difference", "largest relative difference")
    print_table(f"{folders[0]} and {folders[1]}", columns, rows_by_kind)

    if differences:
        top = differences[:NUM_SHOWN]
        rows = ((d.name, d.note or f"{d.largest:.3g}", f"{d.relative:.3g}") for d in top)
        print_table(
            f"the {len(top)} that differ most",
            ("tensor", "largest difference", "relative"),
            rows,
        )


@checkpoint_app.command("export")
def export_command(
    checkpoint: CheckpointPath,
    out: Annotated[Path, path_argument("OUT", "Folder to write; must not exist.")],
    use_ema: Annotated[
        bool,
        typer.Option(
            "--averaged", help="Export the moving average of the weights (optimizer.ema)."
        ),
    ] = False,
    file_gb: Annotated[float, typer.Option(min=0.001, help="Maximum file size in GB.")] = 4.0,
) -> None:
    """Export the weights as safetensors, with config, tokenizer and codes.

    Only one tensor is in memory at a time.
    """
    if not isfinite(file_gb):
        raise UserError(f"--file-gb {file_gb}: expected a number of gigabytes, e.g. 4")
    folder = _resolve_checkpoint(checkpoint)
    check_absent(out)

    with work_progress("exporting"):
        # after the look at the files, as it loads torch
        from bitlm_dist.training.export import export_checkpoint

        size = export_checkpoint(folder, out, use_ema, int(file_gb * 1e9))
    print_line(f"{out}: {size / 2**20:,.1f} MiB of weights from {folder}")


@checkpoint_app.command("import")
def import_command(
    source: Annotated[
        Path, path_argument("FOLDER", "Folder written by `bitlm checkpoint export`.")
    ],
    run: Annotated[Path, path_argument("RUN", "Run folder to create; must not exist.")],
) -> None:
    """Create a run folder from exported weights, for `bitlm eval` and `bitlm generate`."""
    from bitlm_dist.training.export_record import read_export_record

    check_absent(run)
    read_export_record(source)
    with work_progress("importing"):
        # after the look at the files, as it loads torch
        from bitlm_dist.training.export import import_checkpoint

        import_checkpoint(source, run)
    print_line(f"{run}: evaluate it with `bitlm eval {run}`")


def _checkpoint_folders(run: Path) -> list[Path]:
    """Folders of the checkpoints of a run, whole or damaged, oldest first."""
    from bitlm_dist.checkpoint.steps import all_steps, folder_of
    from bitlm_dist.launch.attempts import check_checkpoint_link
    from bitlm_dist.training.checkpoint_folder import CHECKPOINTS

    check_checkpoint_link(run)
    root = run / CHECKPOINTS
    if not root.is_dir():
        raise UserError(f"{run}{relative_to_note(run)} is no run folder: it holds no checkpoints/")
    return [folder_of(root, step) for step in all_steps(root)]


def _resolve_checkpoint(path: Path) -> Path:
    """Resolve a path to a checkpoint: the folder itself, or the latest checkpoint of a run."""
    from bitlm_dist.checkpoint.steps import MANIFEST
    from bitlm_dist.checkpoint.store import read_manifest

    if not (path / MANIFEST).is_file():
        folders = _checkpoint_folders(path)
        if not folders:
            raise UserError(f"{path} holds no checkpoint yet")
        path = folders[-1]

    read_manifest(path)  # refuses a damaged one
    return path


def _table_row(row: dict[str, Any]) -> tuple[object, ...]:
    saved = datetime.fromtimestamp(row["saved"]).strftime("%Y-%m-%d %H:%M:%S")
    return (
        Path(row["folder"]).name,
        f"{row['tokens']:,}",
        f"{row['bytes'] / 2**20:,.1f}",
        saved,
        HEALTH_LABELS[row["healthy"]],
    )
