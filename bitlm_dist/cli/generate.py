"""The command `bitlm generate`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from bitlm_dist.cli.console import AsJson, Run, console
from bitlm_dist.cli.trained_run import load_trained_config
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError, log_to_stderr
from bitlm_dist.formatting import plural
from bitlm_dist.inference.config import SamplingConfig
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.cli.text_output import BitWatcher
    from bitlm_dist.data_prep.tokenizer import Tokenizer
    from bitlm_dist.inference.generate import GenerationStats
    from bitlm_dist.model.language_model import LanguageModel


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

    Keys of the sampling section can be overridden: --sampling.steps 4. So can those of evaluation,
    parallel and logging, data.path, the cache and model.backbone.attention.
    """
    from bitlm_dist.cli.progress import work_progress
    from bitlm_dist.training.trained_files import find_trained_steps

    # What only looks at words and files comes first: torch takes seconds to import.
    if watch and as_json:
        raise UserError("--watch and --json exclude each other: leave out one of them")
    _check_prompt(prompt)
    config = load_trained_config(run, overrides or [], "generate")
    step = find_trained_steps(run, config)[-1]

    with work_progress(f"loading {run}, step {step}"):
        from bitlm_dist.training.weights import load_trained_model

        folder, model, _ = load_trained_model(run, config)
        tokenizer = folder.tokenizer()

    ids = tokenizer.encode_batch([prompt])[0].tolist() if prompt else []
    _warn_of_long_prompt(len(ids), config)
    watcher = _make_watcher(model, config, len(ids) % model.block_size) if watch else None
    request = _Request(prompt, ids, blocks, seed, config.sampling)
    _generate(model, tokenizer, request, watcher, as_json)


class _Request(NamedTuple):
    """What to generate, and how."""

    prompt: str
    ids: list[int]  # of the prompt
    num_blocks: int
    seed: int
    sampling: SamplingConfig


def _generate(
    model: "LanguageModel",
    tokenizer: "Tokenizer",
    request: _Request,
    watcher: "BitWatcher | None",
    as_json: bool,
) -> None:
    """Generate, and print the text as it grows, or after all rows of bits, or as JSON."""
    from bitlm_dist.cli.text_output import TextStream
    from bitlm_dist.inference.generate import GenerationStats, generate_blocks

    ids = request.ids
    num_known = len(ids) % model.block_size  # tokens of the first block

    def decode(new: Sequence[int]) -> str:
        """The text of the new tokens."""
        return tokenizer.decode_after(ids, new)

    # With --json nothing else may be on standard output; between rows of bits no text can grow.
    stream = None if as_json or watcher else TextStream(decode, request.prompt)
    stats = GenerationStats()
    new: list[int] = []
    for new_tokens in generate_blocks(
        model,
        ids,
        bos=tokenizer.bos,
        num_blocks=request.num_blocks,
        sampling=request.sampling,
        seed=request.seed,
        stats=stats,
        callback=watcher.show_pass if watcher else None,
    ):
        new += new_tokens
        if stream:
            stream.show(new)
        if watcher:
            watcher.show_block(_token_texts(tokenizer, [*ids, *new], num_known + len(new_tokens)))
            num_known = 0

    if watcher:
        console.print()
        TextStream(decode, request.prompt).show(new)
    _print_end(decode(new), new, stats, as_json)


def _check_prompt(prompt: str) -> None:
    """Refuse a prompt that no tokenizer can read.

    Raises:
        UserError: its bytes are no UTF-8, which Python keeps as surrogates.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt is no UTF-8 text: character {error.start + 1} of it cannot be read: "
            "convert it, e.g. with iconv -t UTF-8"
        ) from None


def _warn_of_long_prompt(num_tokens: int, config: Config) -> None:
    """Warn if the prompt alone is longer than what the model has seen in training."""
    length = config.data.sequence_length
    if num_tokens > length:
        log_to_stderr(
            f"warning: the prompt has {num_tokens:,} tokens, the model was trained on sequences "
            f"of {length:,}: what it writes after more than that may be poor"
        )


def _make_watcher(model: "LanguageModel", config: Config, num_known: int) -> "BitWatcher | None":
    """The watcher of a model's bits, with its legend printed; None if the model has no bits."""
    from bitlm_dist.cli.text_output import BitWatcher
    from bitlm_dist.model.bitlm import BitLM

    if not isinstance(model, BitLM):
        log_to_stderr("warning: --watch: a softmax has no bits to watch")
        return None
    watcher = BitWatcher(
        console,
        model.codes.num_bits,
        is_sequential=config.sampling.sampler == "sequential",
        num_known=num_known,
    )
    watcher.print_legend()
    return watcher


def _token_texts(tokenizer: "Tokenizer", ids: Sequence[int], num_last: int) -> list[str]:
    """The text of each of the last tokens; of a character's first bytes, replacement characters."""
    return [
        tokenizer.decode_after(ids[:index], [ids[index]])
        for index in range(len(ids) - num_last, len(ids))
    ]


def _print_end(text: str, ids: Sequence[int], stats: "GenerationStats", as_json: bool) -> None:
    """Print what was generated and at which cost, or only the cost if the text is on screen."""
    rate = stats.tokens / max(stats.seconds, 1e-9)
    if as_json:
        report = {
            "text": text,
            "token_ids": ids,
            "backbone_passes": stats.backbone_passes,
            "head_passes": stats.head_passes,
            "tokens_per_second": rate,
        }
        print(to_json(report))
        return

    head_passes = plural(stats.head_passes, "head pass", "head passes")
    passes = f"{stats.backbone_passes:,} backbone and {head_passes}"
    tokens = plural(stats.tokens, "token")
    console.print(f"\n[dim]{tokens}, {passes}, {rate:.0f} tokens/s[/dim]", soft_wrap=True)
