"""The command `bitlm launch`."""

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from bitlm_dist import errors
from bitlm_dist.cli.console import (
    OVERRIDES,
    AsJson,
    ConfigWords,
    Run,
    load_config_from_words,
    path_expander,
    print_line,
    print_table,
)
from bitlm_dist.config import Config, warnings_of
from bitlm_dist.config_loading import with_absolute_paths
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.launch.cluster import Cluster

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
    from bitlm_dist.launch import submit
    from bitlm_dist.launch.render import render

    settings = _load_cluster(
        cluster, partition=partition, account=account, time=time, max_restarts=max_restarts
    )
    config = with_absolute_paths(load_config_from_words(words or []).config)
    job = submit.build_job(config, settings, nodes, tuple(filter(None, exclude.split(","))))

    # on standard error, as the script goes to standard output
    for warning in warnings_of(config):
        errors.log_to_stderr(f"warning: {warning}")
    if dry_run:
        print(render(job), end="")
        return
    if _is_trained(config):
        return

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

    Ctrl-C saves a checkpoint and stops the run.
    """
    from bitlm_dist.launch import submit
    from bitlm_dist.launch.attempts import Action, Outcome, read_attempts
    from bitlm_dist.launch.local import run_local

    settings = _load_cluster(cluster, tasks_per_node=ranks, max_restarts=max_restarts, numa=())
    config = with_absolute_paths(load_config_from_words(words or []).config)
    job = submit.build_job(config, settings, 1, ())
    submit.check_can_start(job)
    if _is_trained(config):
        return

    submit.write_job_files(job, config)
    decision = run_local(config.run.dir, ranks, settings.env, print_line)
    if decision.action != Action.END:
        print_line(f"bitlm: {decision.reason}")
    if decision.action in (Action.END, Action.REQUEUE):
        raise typer.Exit(0)

    # the run was given up
    diverged = read_attempts(config.run.dir)[-1].outcome == Outcome.DIVERGED
    raise typer.Exit(errors.DIVERGED_EXIT_CODE if diverged else 1)


@launch_app.command("status")
def status_command(run: Run, as_json: AsJson = False) -> None:
    """Show state, attempts, step, speed, latest checkpoint and time left."""
    from bitlm_dist.launch.status import status_of

    status = status_of(run)
    if as_json:
        print(to_json(asdict(status)))
        return

    # a value that is not known yet is an empty cell
    time_left = (
        "" if status.seconds_left is None else str(timedelta(seconds=round(status.seconds_left)))
    )
    speeds = [
        "" if rate is None else f"{rate:,.0f}"
        for rate in (status.tokens_per_second, status.predicted_tokens_per_second)
    ]
    rows = [
        ("state", status.state),
        ("job", status.job),
        ("attempts", status.attempts),
        ("last attempt that ended", status.last),
        ("step", f"{status.step:,} of {status.steps:,}"),
        ("tokens per second", speeds[0]),
        ("predicted tokens per second", speeds[1]),
        ("newest checkpoint", "none" if status.checkpoint < 0 else f"step {status.checkpoint:,}"),
        ("time left", time_left),
        ("nodes left out", ", ".join(status.excluded) or "none"),
    ]
    print_table(str(run), ("", "value"), rows)


@launch_app.command("logs")
def logs_command(
    run: Run,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Rank; default: the one that failed first; if none did, rank 0."),
    ] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt; default: the latest.")
    ] = None,
) -> None:
    """Print the end of a rank's log."""
    from bitlm_dist.launch.status import read_log_tail

    title, lines = read_log_tail(run, rank, attempt)
    print_line(title)
    for line in lines:
        print_line(line)


@launch_app.command("cancel")
def cancel_command(run: Run) -> None:
    """Checkpoint and stop the run; `bitlm launch resume` continues it."""
    from bitlm_dist.launch.submit import cancel_run

    jobs = cancel_run(run)
    message = (
        f"job {', '.join(jobs)} saves and ends"
        if jobs
        else "no job is queued or running; what runs here saves and ends"
    )
    print_line(f"{run}: {message}")


@launch_app.command("resume")
def resume_command(run: Run) -> None:
    """Queue a stopped run again, with its saved batch script."""
    from bitlm_dist.launch.submit import resume_run

    submission = resume_run(run)
    print_line(
        f"{submission.run}: job {submission.job}; `bitlm launch status {submission.run}` shows it"
    )
