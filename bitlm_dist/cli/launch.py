"""The command `bitlm launch`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from bitlm_dist import errors
from bitlm_dist.cli.console import (
    OVERRIDES,
    AsJson,
    ConfigWords,
    Run,
    console,
    load_config_from_words,
    path_expander,
    print_line,
    print_table,
)
from bitlm_dist.config import Config, warnings_of
from bitlm_dist.config_loading import with_absolute_paths
from bitlm_dist.disks import format_bytes
from bitlm_dist.formatting import (
    format_duration,
    format_percent,
    format_time,
    format_value,
    plural,
)
from bitlm_dist.launch.rank_log import TIME_PATTERN
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.launch.cluster import Cluster
    from bitlm_dist.launch.history import AttemptHistory, History
    from bitlm_dist.launch.status import Status

launch_app = typer.Typer(
    no_args_is_help=True, help="Start and manage runs on a cluster or on this machine."
)
MaxRestarts = Annotated[
    int | None,
    typer.Option(help="Consecutive restarts without a new checkpoint before giving up."),
]


def _load_cluster(name: str | None, **changes: object) -> "Cluster":
    from bitlm_dist.launch.cluster import load_cluster

    return load_cluster(name if name is None else path_expander("--cluster")(name), changes)


def _is_trained(config: Config) -> bool:
    """True if the run is complete, so that nothing is to be started; prints a line that says so."""
    from bitlm_dist.launch.status import is_trained

    trained = is_trained(config.run.dir, config)
    if trained:
        print_line(
            f"{config.run.dir} is trained: step {config.training.steps} of {config.training.steps}"
        )
    return trained


def _check_ablation(config: Config) -> None:
    """Check what only the code of an ablation tells: its name, and which losses it has.

    Raises:
        UserError: the ranks would refuse the head, after the queue.
    """
    if config.head.kind != "ablation" or config.model.output != "bits":
        return
    from bitlm_dist.codes import num_bits_needed
    from bitlm_dist.data.manifest import read_manifest
    from bitlm_dist.model.heads.build import meta_head

    assert config.data.path is not None
    vocabulary = int(read_manifest(config.data.path)["vocabulary"])
    meta_head(config, config.model.bits or num_bits_needed(vocabulary))


@launch_app.command("slurm", context_settings=OVERRIDES)
def slurm_command(
    words: ConfigWords = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="YAML file, or shipped cluster config: plain, pyxis-8xh100, numa-8xh100."
        ),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    time: Annotated[str | None, typer.Option(help="Walltime, HH:MM:SS or D-HH:MM:SS.")] = None,
    max_restarts: MaxRestarts = None,
    exclude: Annotated[str, typer.Option(help="Nodes to exclude, separated by commas.")] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the batch script without saving or submitting it."),
    ] = False,
) -> None:
    """Submit a run to Slurm.

    It checkpoints and exits before the time limit or on preemption, and resumes automatically.
    Nodes are checked first. Failing or hanging ranks are reported and the run is restarted, as long
    as it reaches new checkpoints.
    """
    from bitlm_dist.launch import job_files, submit
    from bitlm_dist.launch.render import render
    from bitlm_dist.training.run_claim import check_claim

    settings = _load_cluster(
        cluster, partition=partition, account=account, time=time, max_restarts=max_restarts
    )
    config = with_absolute_paths(load_config_from_words(words or []).config)
    job = job_files.build_job(config, settings, nodes, tuple(filter(None, exclude.split(","))))
    _check_ablation(config)

    # on standard error, as the script goes to standard output
    for warning in warnings_of(config):
        errors.log_to_stderr(f"warning: {warning}")
    if dry_run:
        print(render(job), end="")
        return
    if _is_trained(config):
        return

    check_claim(config.run.dir, config)  # what the ranks would refuse after the queue
    submission = submit.submit_job(job, config)
    print_line(
        f"{submission.run}: job {submission.job}, "
        f"{job.num_nodes} × {settings.ranks_per_node} ranks; "
        f"`bitlm launch status {submission.run}` shows it"
    )


@launch_app.command("local", context_settings=OVERRIDES)
def local_command(
    words: ConfigWords = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=1, help="Number of ranks.")] = 1,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster config; only env, watch and max_restarts apply.")
    ] = None,
    max_restarts: MaxRestarts = None,
) -> None:
    """Train on this machine, supervised and restarted as on a cluster.

    Ctrl-C saves a checkpoint and stops the run, with exit code 75; the same command goes on.
    """
    from bitlm_dist.launch import job_files, submit
    from bitlm_dist.launch.local import run_local
    from bitlm_dist.training.run_claim import check_start

    settings = _load_cluster(cluster, tasks_per_node=ranks, max_restarts=max_restarts, numa=())
    config = with_absolute_paths(load_config_from_words(words or []).config)
    if _is_trained(config):
        return

    # first what the ranks would refuse in a moment, as the layout needs torch, which takes seconds
    check_start(config, rank=0)
    job = job_files.build_job(config, settings, 1, ())
    submit.check_can_start(job)
    job_files.write_job_files(job, config, is_local=True)
    raise typer.Exit(run_local(config.run.dir, ranks, settings.env, _print_log_line))


def _print_log_line(line: str) -> None:
    """Print a line of a launcher or rank, with the time where the output is no terminal."""
    has_time = console.is_terminal or TIME_PATTERN.match(line)
    print_line(line if has_time else f"{format_time()} {line}")


@launch_app.command("status")
def status_command(run: Run, as_json: AsJson = False) -> None:
    """Show state, attempts, step, loss, speed, memory, latest checkpoint and time left."""
    from bitlm_dist.launch.status import status_of

    status = status_of(run)
    if as_json:
        print(to_json(asdict(status)))
    else:
        print_table(str(run), ("", "value"), _status_rows(status))


def _status_rows(status: "Status") -> list[tuple[str, str]]:
    """The rows of a status; what is not known is left out."""
    from bitlm_dist.launch.outcomes import first_clause

    memory = _format_memory(status.host_memory_bytes, status.host_memory_peak_bytes)
    gpu_memory = _format_memory(status.device_memory_bytes, status.device_memory_peak_bytes)
    predicted = _format_known(status.predicted_tokens_per_second, "{:,.0f}")
    rows = [
        ("state", status.state),
        ("job", status.job),
        ("attempts", str(status.attempts)),
        ("last attempt that ended", first_clause(status.last)),
        ("step", f"{status.step:,} of {status.steps:,}"),
        ("loss", _format_known(status.loss, "{:.4f}")),
        ("validation", _format_validation(status)),
        ("tokens per second", _format_known(status.tokens_per_second, "{:,.0f}")),
        ("predicted tokens per second", predicted),
        ("waiting for data", _format_share(status.data_wait)),
        ("memory of rank 0", memory),
        ("memory of its GPU", gpu_memory),
        ("latest checkpoint", "none" if status.checkpoint < 0 else f"step {status.checkpoint:,}"),
        ("time so far", format_duration(status.seconds) if status.attempts else ""),
        ("of it in lasting steps", _format_share(status.goodput)),
        ("time left", format_duration(status.seconds_left) if status.seconds_left else ""),
        ("excluded nodes", ", ".join(status.excluded)),
    ]
    return [row for row in rows if row[1]]


def _format_known(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _format_share(value: float | None) -> str:
    return "" if value is None else format_percent(value)


def _format_memory(now: int | None, peak: int | None) -> str:
    if now is None:
        return ""
    return format_bytes(now) + ("" if peak is None else f", at most {format_bytes(peak)}")


def _format_validation(status: "Status") -> str:
    """Latest and best score of the evaluations during training."""
    if status.validation is None:
        return ""
    latest = f"{status.validation:.4f} bits per byte"
    if status.validation == status.best_validation:
        return f"{latest}, the best so far"
    return f"{latest}; best {status.best_validation:.4f} at step {status.best_validation_step:,}"


@launch_app.command("history")
def history_command(run: Run, as_json: AsJson = False) -> None:
    """Show every attempt: when, its steps, why it ended, and what was lost."""
    from bitlm_dist.launch.history import history_of
    from bitlm_dist.launch.submit import launch_folder

    launch_folder(run)
    history = history_of(run)
    if as_json:
        print(to_json({"run": str(run), **asdict(history)}))
        return
    if not history.attempts:
        print_line(f"{run}: no attempt has begun")
        return

    rows = [
        (
            str(attempt.attempt),
            _format_date(attempt.began),
            _format_date(attempt.ended),
            f"{attempt.seconds / 60:,.1f}",
            f"{attempt.first_step:,} to {format_value(attempt.last_step, '{:,}')}",
            format_value(attempt.steps_lost, "{:,}"),
            _format_outcome(attempt),
        )
        for attempt in history.attempts
    ]
    columns = ("attempt", "from", "to", "minutes", "steps", "lost", "outcome")
    print_table(str(run), columns, rows)
    print_line(_format_total(history))


def _format_date(seconds: float | None) -> str:
    """A time without its year, which is known; a dash if there is none."""
    return "–" if seconds is None else format_time(seconds)[5:].replace("T", " ")


def _format_outcome(attempt: "AttemptHistory") -> str:
    """How an attempt ended, without remedy and details."""
    from bitlm_dist.launch.outcomes import first_clause

    if attempt.outcome:
        return f"{attempt.outcome}: {first_clause(attempt.reason)}"
    return "running" if attempt.ended is None else "no sign of life since then"


def _format_total(history: "History") -> str:
    """The sums of a history, in a sentence."""
    total = (
        f"{plural(len(history.attempts), 'attempt')} in {format_duration(history.seconds)}, "
        f"{plural(history.steps_lost, 'step')} lost"
    )
    if history.goodput is None:
        return total
    return f"{total}; {format_percent(history.goodput)} of the time was spent in lasting steps"


@launch_app.command("logs")
def logs_command(
    run: Run,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0, help="Rank; default: the one that hung or failed first; if none did, rank 0."
        ),
    ] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt; default: the latest.")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Print new lines until the run ends; follows new attempts, too."
        ),
    ] = False,
) -> None:
    """Print the end of a rank's log, and why its attempt ended."""
    from bitlm_dist.launch.logs import follow_log, read_log_tail
    from bitlm_dist.launch.status import is_active
    from bitlm_dist.launch.submit import launch_folder

    launch_folder(run)
    if follow:
        for line in follow_log(run, rank, attempt, lambda: is_active(run)):
            print_line(line)
        return

    title, lines = read_log_tail(run, rank, attempt)
    print_line(title)
    for line in lines:
        print_line(line)


@launch_app.command("cancel")
def cancel_command(run: Run) -> None:
    """Checkpoint and stop the run; `bitlm launch resume` continues it."""
    from bitlm_dist.launch import submit

    goes_on = f"`bitlm launch resume {run}` goes on from there"
    if submit.is_local(run):
        number = submit.cancel_local_run(run)
        if number is None:
            print_line(f"{run}: nothing runs here; `bitlm launch resume {run}` starts it again")
        else:
            what = f"attempt {number} saves and ends" if number else "no attempt follows"
            print_line(f"{run}: {what}; {goes_on}")
        return

    jobs = submit.cancel_run(run)
    message = (
        f"job {', '.join(jobs)} saves and ends; {goes_on}"
        if jobs
        else "no job is queued or running"
    )
    print_line(f"{run}: {message}")


@launch_app.command("resume")
def resume_command(run: Run) -> None:
    """Start a stopped run again: queue its batch script, or train here if it was local."""
    from bitlm_dist.launch import submit
    from bitlm_dist.launch.local import run_local

    if not submit.is_local(run):
        submission = submit.resume_run(run)
        print_line(
            f"{submission.run}: job {submission.job}; "
            f"`bitlm launch status {submission.run}` shows it"
        )
        return

    local = submit.resume_local_run(run)
    config = submit.launched_config(run)
    if not _is_trained(config):
        raise typer.Exit(run_local(config.run.dir, local.num_ranks, local.env, _print_log_line))
