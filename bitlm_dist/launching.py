"""The command `bitlm launch`."""

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from bitlm_dist import errors
from bitlm_dist.config import Config, warnings_of
from bitlm_dist.config_loading import absolute
from bitlm_dist.files import to_json
from bitlm_dist.terminal import OVERRIDES, AsJson, Run, Words, config_of, expanded_path, say, show_table

if TYPE_CHECKING:
    from bitlm_dist.launch.cluster import Cluster

launching = typer.Typer(no_args_is_help=True, help="Start runs on a cluster or on this machine, and look after them.")
MaxRestarts = Annotated[int | None, typer.Option(help="In a row without a new checkpoint; then the run is given up.")]


def _cluster(name: str | None, **changes: object) -> "Cluster":
    from bitlm_dist.launch.cluster import load_cluster

    return load_cluster(name if name is None else expanded_path("--cluster")(name), changes)


def _is_trained(config: Config) -> bool:
    """Whether nothing is left to do, and so nothing is to be started; says so."""
    from bitlm_dist.launch.status import is_trained

    trained = is_trained(config.run.dir, config)
    if trained:
        say(f"{config.run.dir} is trained: step {config.training.steps} of {config.training.steps}")
    return trained


@launching.command("slurm", context_settings=OVERRIDES)
def slurm_command(
    words: Words = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="YAML file, or a shipped name: plain, pyxis-8xh100, numa-8xh100.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    time: Annotated[str | None, typer.Option(help="Walltime, HH:MM:SS or D-HH:MM:SS.")] = None,
    max_restarts: MaxRestarts = None,
    exclude: Annotated[str, typer.Option(help="Nodes not to use, N,N…")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, save and submit nothing.")] = False,
) -> None:
    """Queue a run: it saves and gives way before the time limit and when preempted, and goes on by itself.

    Nodes are measured first; ranks that fail or hang are named and started again; a run that makes no checkpoint is given up.
    """
    from bitlm_dist.launch import submit
    from bitlm_dist.launch.render import render

    settings = _cluster(cluster, partition=partition, account=account, time=time, max_restarts=max_restarts)
    config = absolute(config_of(words or []).config)
    job = submit.job_of(config, settings, nodes, tuple(filter(None, exclude.split(","))))
    for warning in warnings_of(config):
        errors.say(f"warning: {warning}")
    if dry_run:
        print(render(job), end="")
        return
    if _is_trained(config):
        return
    done = submit.submit(job, config)
    say(f"{done.run}: job {done.job}, {job.nodes} × {settings.ranks_per_node} ranks; `bitlm launch status {done.run}` shows it")


@launching.command("local", context_settings=OVERRIDES)
def local_command(
    words: Words = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=1, help="Processes.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="YAML file: its env, watch and max_restarts count here.")] = None,
    max_restarts: MaxRestarts = None,
) -> None:
    """Train on this machine with as many processes, watched and restarted as on a cluster; Ctrl-C saves and ends."""
    from bitlm_dist.launch import submit
    from bitlm_dist.launch.attempts import DIVERGED, read_attempts
    from bitlm_dist.launch.local import run_here

    settings = _cluster(cluster, tasks_per_node=ranks, max_restarts=max_restarts, numa=())
    config = absolute(config_of(words or []).config)
    job = submit.job_of(config, settings, 1, ())
    submit.check(job)
    if _is_trained(config):
        return
    submit.save(job, config)
    verdict = run_here(config.run.dir, ranks, settings.env, say)
    if verdict.action != "end":
        say(f"bitlm: {verdict.reason}")
    if verdict.action in ("end", "requeue"):
        raise typer.Exit(0)
    diverged = read_attempts(config.run.dir)[-1].outcome == DIVERGED
    raise typer.Exit(errors.DIVERGED if diverged else 1)


@launching.command("status")
def status_command(run: Run, as_json: AsJson = False) -> None:
    """State, attempts, step, speed, last checkpoint, time left."""
    from bitlm_dist.launch.status import status_of

    found = status_of(run)
    if as_json:
        print(to_json(asdict(found)))
        return
    left = "" if found.seconds_left is None else str(timedelta(seconds=round(found.seconds_left)))
    speeds = ["" if rate is None else f"{rate:,.0f}" for rate in (found.tokens_per_second, found.predicted_tokens_per_second)]
    rows = [
        ("state", found.state),
        ("job", found.job),
        ("attempts", found.attempts),
        ("last attempt that ended", found.last),
        ("step", f"{found.step:,} of {found.steps:,}"),
        ("tokens per second", speeds[0]),
        ("predicted tokens per second", speeds[1]),
        ("newest checkpoint", "none" if found.checkpoint < 0 else f"step {found.checkpoint:,}"),
        ("time left", left),
        ("nodes left out", ", ".join(found.excluded) or "none"),
    ]
    show_table(str(run), ("", "is"), rows)


@launching.command("logs")
def logs_command(
    run: Run,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Of this rank; none: of the one that failed first, else of rank 0.")
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of this attempt; none: of the newest.")] = None,
) -> None:
    """The end of what a rank printed."""
    from bitlm_dist.launch.status import log_of

    title, lines = log_of(run, rank, attempt)
    say(title)
    for line in lines:
        say(line)


@launching.command("cancel")
def cancel_command(run: Run) -> None:
    """Have the run save and end; `resume` brings it back."""
    from bitlm_dist.launch.submit import cancel

    jobs = cancel(run)
    say(
        f"{run}: "
        + (f"job {', '.join(jobs)} saves and ends" if jobs else "no job is queued or running; what runs here saves and ends")
    )


@launching.command("resume")
def resume_command(run: Run) -> None:
    """Queue the saved script again."""
    from bitlm_dist.launch.submit import resume

    done = resume(run)
    say(f"{done.run}: job {done.job}; `bitlm launch status {done.run}` shows it")
