"""The command `bitlm generate`."""

from typing import Annotated

import typer

from bitlm_dist import config_loading
from bitlm_dist.cli.console import AsJson, Run, console
from bitlm_dist.strict_json import to_json


def generate_command(
    run: Run,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[--SECTION.KEY VALUE]…")] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    blocks: Annotated[int, typer.Option(min=1, help="Maximum number of blocks to write.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise.")] = 0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the bits of each block as they settle.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Generate text, block by block.

    Keys of the sampling section can be overridden: --sampling.steps 4.
    """
    from bitlm_dist.cli.text_output import BitWatcher, TextStream
    from bitlm_dist.inference.generate import GenerationStats, generate_blocks
    from bitlm_dist.training.weights import load_trained_model

    config = config_loading.load_run_config(run, overrides or [])
    folder, model, _ = load_trained_model(run, config)
    tokenizer = folder.tokenizer()
    ids = tokenizer.encode_batch([prompt])[0].tolist() if prompt else []

    # With --json nothing else may be on standard output.
    watcher = BitWatcher(console) if watch and not as_json else None
    stream = None if as_json else TextStream(lambda new: tokenizer.decode_after(ids, new), prompt)

    stats = GenerationStats()
    new: list[int] = []
    for new_tokens in generate_blocks(
        model,
        ids,
        bos=tokenizer.bos,
        num_blocks=blocks,
        sampling=config.sampling,
        seed=seed,
        stats=stats,
        callback=watcher,
    ):
        new += new_tokens
        if stream:
            stream.show(new)

    rate = stats.tokens / max(stats.seconds, 1e-9)
    if as_json:
        report = {
            "text": tokenizer.decode_after(ids, new),
            "token_ids": new,
            "backbone_passes": stats.backbone_passes,
            "head_passes": stats.head_passes,
            "tokens_per_second": rate,
        }
        print(to_json(report))
    else:
        passes = f"{stats.backbone_passes} backbone and {stats.head_passes} head passes"
        console.print(f"\n[dim]{stats.tokens} tokens, {passes}, {rate:.0f} tokens/s[/dim]")
