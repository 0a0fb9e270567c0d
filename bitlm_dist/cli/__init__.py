"""The command `bitlm`.

Heavy imports are deferred until a command runs, so that --help and usage errors are immediate.
"""

from importlib import metadata
from typing import Annotated

import typer

from bitlm_dist.cli.accept import doctor_command
from bitlm_dist.cli.bench import bench
from bitlm_dist.cli.checkpoint import checkpoint_app
from bitlm_dist.cli.compare import compare_command
from bitlm_dist.cli.config import config_command
from bitlm_dist.cli.console import OVERRIDES
from bitlm_dist.cli.data import data_app
from bitlm_dist.cli.evaluate import eval_command
from bitlm_dist.cli.generate import generate_command
from bitlm_dist.cli.launch import launch_app
from bitlm_dist.cli.prep import prep_command
from bitlm_dist.cli.train import train_command

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Pretrain language models that write a block of tokens at once, as bits, by diffusion.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bitlm {metadata.version('bitlm-dist')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


app.add_typer(bench, name="bench")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(data_app, name="data")
app.add_typer(launch_app, name="launch")

app.command("prep")(prep_command)
app.command("train", context_settings=OVERRIDES)(train_command)
app.command("eval", context_settings=OVERRIDES)(eval_command)
app.command("compare")(compare_command)
app.command("generate", context_settings=OVERRIDES)(generate_command)
app.command("config")(config_command)
app.command("doctor")(doctor_command)
