"""The command `bitlm train`."""

import os
import shlex
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from bitlm_dist.cli.config import config_as_yaml
from bitlm_dist.cli.console import (
    ConfigWords,
    console,
    load_config_from_words,
    print_line,
    print_table,
)
from bitlm_dist.cli.evaluate import open_evaluator
from bitlm_dist.config import Config, warnings_of
from bitlm_dist.config_loading import with_absolute_paths
from bitlm_dist.errors import STOPPED_EXIT_CODE, UserError
from bitlm_dist.formatting import plural
from bitlm_dist.launch.rank_info import is_launched

if TYPE_CHECKING:
    import torch

    from bitlm_dist.cpu_contention import CpuContention
    from bitlm_dist.launch.heartbeat import Heartbeat
    from bitlm_dist.parallel.layout import ParallelLayout
    from bitlm_dist.training.trainer import Trainer

# Text that is repeated more often teaches little (Muennighoff et al., 2023).
MANY_EPOCHS = 4


def train_command(
    words: ConfigWords = None,
    resume: Annotated[
        bool, typer.Option(help="Resume from the latest checkpoint of the run folder, if any.")
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the parameter counts of the model and exit."),
    ] = False,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print every value and its source as YAML, and exit."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print warnings and errors alone.")
    ] = False,
) -> None:
    """Start or resume a training run.

    Every config key can be overridden: --training.steps 500 --model.block_size=8.

    The loss shown is the training objective: for BitLM a sum of terms in nats
    per bit, for a softmax nats per token. Evaluations, see
    evaluation.every_steps, are in bits per byte of text.

    Ctrl-C, SIGTERM or a file `stop` in the run folder save and end the run
    with exit code 75; the same command goes on from there.
    """
    loaded = load_config_from_words(words or [])
    if print_config:
        print(config_as_yaml(loaded))
        return
    if dry_run:
        _dry_run(loaded.config)
        return

    # A launcher reads the outcome from a file, and would take another exit code for a failure.
    stopped = _start(loaded.config, resume, quiet)
    if stopped and not is_launched(os.environ):
        raise typer.Exit(STOPPED_EXIT_CODE)


def _start(config: Config, resume: bool, quiet: bool) -> bool:
    """Check what needs no torch, load it, and train.

    Returns:
        True if the run was stopped on request before its end.
    """
    from bitlm_dist.cpu_contention import CpuContention
    from bitlm_dist.launch.heartbeat import Heartbeat
    from bitlm_dist.launch.rank_info import export_rank_info, read_rank_info
    from bitlm_dist.launch.status import is_trained
    from bitlm_dist.training.run_claim import check_start

    ranks = read_rank_info(os.environ)
    busy_cores = CpuContention()
    if ranks.world_size > 1:
        export_rank_info(ranks, os.environ)

    # Before torch is imported, which takes seconds.
    check_start(config, ranks.rank, resume)
    if ranks.world_size == 1 and is_trained(config.run.dir, with_absolute_paths(config)):
        _report_trained(config, quiet)
        return False
    if ranks.rank == 0 and not quiet:
        print_line(f"bitlm train: {config.run.dir}: loading torch…")

    # The heart beats before the slow imports, so that a rank that hangs in them is noticed.
    with Heartbeat.from_environment(os.environ, ranks.rank, ranks.world_size) as heartbeat:
        from bitlm_dist.parallel.layout import build_layout

        layout = build_layout(config.parallel, ranks.world_size, ranks.rank)
        return _train(config, resume, layout, heartbeat, busy_cores, quiet)


def _train(
    config: Config,
    resume: bool,
    layout: "ParallelLayout",
    heartbeat: "Heartbeat",
    busy_cores: "CpuContention",
    quiet: bool,
) -> bool:
    """Train on this rank; rank 0 prints and reports the outcome to the launcher.

    Returns:
        True if the run was stopped on request before its end.
    """
    from bitlm_dist.launch import attempts
    from bitlm_dist.planning.memory_check import check_training_memory
    from bitlm_dist.training.trainer import Trainer

    is_rank_zero = layout.rank == 0
    check_training_memory(config, layout)
    with Trainer.build(config, layout).open(resume) as trainer:
        heartbeat.track_steps(lambda: trainer.state.step)
        # Starting a finished run again is no error: a launcher may do so.
        is_trained = trainer.is_done
        if is_trained:
            trainer.raise_if_diverged()
        else:
            if is_rank_zero:
                _print_start(trainer, config, busy_cores, quiet)
            if trainer.device.type == "cuda" and not quiet:
                _print_device(trainer.device, layout.rank)
            _fit(trainer, config, is_rank_zero, has_display=is_rank_zero and not quiet)

    if is_rank_zero and is_trained:
        _report_trained(config, quiet)
    elif is_rank_zero:
        outcome = attempts.Outcome.DONE if trainer.is_done else attempts.Outcome.STOPPED
        attempts.report_outcome(os.environ, outcome, trainer.step, trainer.stopped_by or "")
        if not quiet:
            _print_end(trainer)
    return trainer.stopped_by is not None and not trainer.is_done


def _report_trained(config: Config, quiet: bool) -> None:
    """Tell the user and the launcher that nothing is left to do."""
    from bitlm_dist.launch import attempts

    steps = config.training.steps
    attempts.report_outcome(os.environ, attempts.Outcome.DONE, steps, "")
    if not quiet:
        print_line(f"{config.run.dir} is trained: step {steps} of {steps}")


def _fit(trainer: "Trainer", config: Config, is_rank_zero: bool, has_display: bool) -> None:
    """Train and evaluate to the end or a stop."""
    from bitlm_dist.cli.train_progress import training_progress

    with ExitStack() as stack:
        evaluator = (
            stack.enter_context(
                open_evaluator(config, is_training=True, print_warning=is_rank_zero)
            )
            if config.evaluation.every_steps
            else None
        )
        display = None
        if has_display:
            display = stack.enter_context(training_progress(console, config, trainer.step))
            trainer.add_hook(display)
        trainer.fit(evaluate=evaluator, display=display)


def _print_start(
    trainer: "Trainer", config: Config, busy_cores: "CpuContention", quiet: bool
) -> None:
    """Print the facts about the run, and warnings."""
    import torch

    from bitlm_dist.parallel.device import warning_of_unused_gpus

    steps_left = config.training.steps - trainer.step
    epochs = trainer.dataset.epochs(
        config.training.steps,
        trainer.state.next_sequence + steps_left * trainer.sequences_per_step,
    )
    if not quiet:
        print_line(
            f"{config.run.dir}: {trainer.engine.num_parameters:,} parameters, step {trainer.step} "
            f"of {config.training.steps}; attention by {trainer.attention_backend}"
        )
        print_line(trainer.dataset.summary())
        print_line(_format_epochs(epochs, config))

    if trainer.device.type == "cpu":
        for warning in (warning_of_unused_gpus(), busy_cores.warning(torch.get_num_threads())):
            if warning:
                print_line(f"warning: {warning}")
    if max(epochs.values(), default=0) > MANY_EPOCHS:
        print_line(
            f"warning: a model learns by heart what it reads more than about {MANY_EPOCHS} times: "
            "train for fewer steps, or on more text"
        )
    for warning in (*trainer.dataset.warnings(trainer.sequences_per_step), *warnings_of(config)):
        print_line(f"warning: {warning}")


def _print_device(device: "torch.device", rank: int) -> None:
    """Print the GPU of a rank."""
    import torch

    name = torch.cuda.get_device_name(device)
    print_line(f"rank {rank} on {socket.gethostname()}: {device}, {name}")


def _print_end(trainer: "Trainer") -> None:
    """Print the loss chart of a finished run and what to do next, or how to continue another."""
    from bitlm_dist.checkpoint.steps import folder_of
    from bitlm_dist.cli.progress import loss_chart
    from bitlm_dist.launch.attempts import requested_stop

    if trainer.is_done:
        title = f"training loss, {_loss_unit(trainer.config)}"
        if chart := loss_chart(trainer.folder.losses(), title=title):
            print_line(chart)
        print_line(
            f"trained: step {trainer.step} of {trainer.config.training.steps}, checkpoint "
            f"{folder_of(trainer.folder.checkpoints, trainer.step)}; "
            f"next: bitlm eval {shlex.quote(str(trainer.folder.path))}"
        )
    elif trainer.stopped_by:
        where = f"saved at step {trainer.step}" if trainer.step else "before the first step"
        why = requested_stop(os.environ) or trainer.stopped_by
        print_line(f"{why}: {where}; the same command goes on from there")


def _loss_unit(config: Config) -> str:
    """The unit of the training objective; docs/run-folder.md has its terms."""
    if config.model.output == "softmax":
        return "nats per token"
    # the other terms are cross-entropies, also where the first one is a squared error
    has_squared_error = config.diffusion.loss in ("x", "v")
    first = "squared error, plus " if has_squared_error else ""
    return f"{first}nats per bit, summed over its terms"


def _format_epochs(epochs: Mapping[str, float], config: Config) -> str:
    """Format how often the run will read each of its sources."""
    assert config.data.path is not None
    parts = []
    for key, number in epochs.items():
        # the keys are "epochs/NAME" for several sources, "epochs" for data.path alone
        name = key.partition("/")[2] or config.data.path.name
        count = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
        parts.append(f"{count} epochs of {name}")
    return f"{plural(config.training.steps, 'step')}: {', '.join(parts)}"


def _dry_run(config: Config) -> None:
    """Build the model on the meta device and print its parameter counts."""
    from bitlm_dist.codes import num_bits_needed
    from bitlm_dist.data.manifest import read_manifest
    from bitlm_dist.model.build import build_meta_model

    if config.data.path is not None and (config.model.bits is None or config.data.path.exists()):
        vocabulary = int(read_manifest(config.data.path)["vocabulary"])
    elif config.model.bits is not None:
        vocabulary = 2**config.model.bits
    else:
        raise UserError("--dry-run needs model.bits, or data.path to ask the tokenizer")

    bits = config.model.bits or num_bits_needed(vocabulary)
    model = build_meta_model(config, vocabulary, bits)
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.components().items()
    }
    # a tied table belongs to two components but counts once
    counts["total"] = sum(p.numel() for p in model.parameters())

    title = (
        f"parameters, {bits} bits per token"
        if config.model.output == "bits"
        else f"parameters, {vocabulary:,} tokens"
    )
    print_table(title, ("part", "parameters"), ((n, f"{c:,}") for n, c in counts.items()))
