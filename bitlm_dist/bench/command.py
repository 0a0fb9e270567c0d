"""The command `bitlm bench`. Heavy imports wait until a bench runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.terminal import OVERRIDES, AsJson, Words, check_plot, config_of, path_argument, path_option, say, show_table

if TYPE_CHECKING:
    from bitlm_dist.bench.results import Results

AGAINST = ("softmax", "plain")
DTYPES = ("float32", "float16", "bfloat16")

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory, side by side in one run; times are medians over repeats.")
Against = Annotated[list[str] | None, typer.Option("--vs", metavar="|".join(AGAINST), help="Compare with; may be repeated.")]
Repeats = Annotated[int, typer.Option(help="Timed repeats of each side, taken in turn.")]
Vocabulary = Annotated[int | None, typer.Option(help="Entries (V); default: those of data.path's tokenizer.")]
Out = Annotated[Path | None, path_option("--out", "Save the results as JSON.", "FILE")]
Plot = Annotated[Path | None, path_option("--plot", "Draw them: .svg, .png or .pdf.", "FILE")]


@bench.command("train", context_settings=OVERRIDES)
def train_command(
    words: Words = None,
    against: Against = None,
    vocabulary: Vocabulary = None,
    repeats: Repeats = 5,
    steps: Annotated[int, typer.Option(help="Training steps a repeat.")] = 4,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Whole training steps. With --vocabulary, or without data.path, on synthetic text; else on the config's data."""
    config = _checked(words, against, {"--repeats": (repeats, 1), "--steps": (steps, 1)}, plot)
    from bitlm_dist.bench.train import Load, bench_train

    size, eos, real = _vocabulary_of(config, vocabulary)
    _report(bench_train(config, Load(size, eos, real, steps), against or [], repeats), out, plot, as_json)


@bench.command("generate", context_settings=OVERRIDES)
def generate_command(
    words: Words = None,
    against: Against = None,
    vocabulary: Vocabulary = None,
    sampler: Annotated[list[str] | None, typer.Option(help="sequential, ode:K or sde:K; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(help="Texts written at once.")] = 1,
    tokens: Annotated[int, typer.Option(help="New tokens of each.")] = 64,
    prompt: Annotated[int, typer.Option(help="Tokens before them.")] = 64,
    repeats: Repeats = 5,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Writing text with a key-value cache, by an untrained model."""
    limits = {"--repeats": (repeats, 1), "--batch": (batch, 1), "--tokens": (tokens, 1), "--prompt": (prompt, 0)}
    config = _checked(words, against, limits, plot)
    from bitlm_dist.bench.generate import Request, bench_generate

    size, _, _ = _vocabulary_of(config, vocabulary)
    _report(bench_generate(config, Request(size, batch, tokens, prompt), against or [], sampler or [], repeats), out, plot, as_json)


@bench.command("data", context_settings=OVERRIDES)
def data_command(
    words: Words = None,
    repeats: Repeats = 5,
    batches: Annotated[int, typer.Option(help="Batches that a repeat reads.")] = 50,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Reading and packing the config's data, cold (a folder just opened) and warm, beside its training steps."""
    config = _checked(words, None, {"--repeats": (repeats, 1), "--batches": (batches, 1)}, None)
    if config.data.path is None:
        raise UserError("data.path is not set: add --data.path FOLDER")
    from bitlm_dist.bench.data import bench_data
    from bitlm_dist.bench.train import Load

    size, eos, _ = _vocabulary_of(config, None)
    _report(bench_data(config, Load(size, eos, True, 1), batches, repeats), out, None, as_json)


Lengths = Annotated[list[int] | None, typer.Option("--length", help="Tokens of a row; may be repeated. Default: 1024.")]
Batch = Annotated[int, typer.Option(help="Rows.")]
Heads = Annotated[int, typer.Option(help="Query heads.")]
HeadWidth = Annotated[int, typer.Option("--width", help="Width of a head.")]
BlockSize = Annotated[int, typer.Option("--block", help="Tokens a block (m).")]
Dtype = Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: bfloat16 on a GPU, float32 on a CPU.")]
Backends = Annotated[list[str] | None, typer.Option("--backend", help="May be repeated; default: all that are here and can.")]


@bench.command("attention")
def attention_command(
    length: Lengths = None,
    batch: Batch = 2,
    heads: Heads = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key-value heads; default: as many.")] = None,
    width: HeadWidth = 64,
    block: BlockSize = 4,
    documents: Annotated[int, typer.Option(help="Documents of equal length in each row.")] = 1,
    dtype: Dtype = None,
    backend: Backends = None,
    repeats: Repeats = 5,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Block-causal attention, forward and backward: every back end, causal flash attention, and SDPA with a dense mask."""
    groups = heads if kv_heads is None else kv_heads
    sizes = {"batch": batch, "heads": heads, "kv_heads": groups, "width": width, "block": block, "documents": documents}
    _kernels("attention", length, sizes, dtype, backend, repeats, out, plot, as_json)


@bench.command("in-block")
def in_block_command(
    length: Lengths = None,
    batch: Batch = 8,
    heads: Heads = 4,
    width: HeadWidth = 64,
    block: BlockSize = 4,
    dtype: Dtype = None,
    backend: Backends = None,
    repeats: Repeats = 5,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Attention inside blocks, forward and backward: every back end, SDPA over a batch of blocks, and a copy of as many bytes."""
    sizes = {"batch": batch, "heads": heads, "kv_heads": heads, "width": width, "block": block}
    _kernels("in-block", length, sizes, dtype, backend, repeats, out, plot, as_json)


def _kernels(
    kind: str,
    lengths: list[int] | None,
    sizes: dict[str, int],
    dtype: str | None,
    backends: list[str] | None,
    repeats: int,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    lengths = lengths or [1024]
    for name, value in {**sizes, "length": min(lengths), "repeats": repeats}.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if sizes["heads"] % sizes["kv_heads"]:
        raise UserError(f"--heads {sizes['heads']} is no multiple of --kv-heads {sizes['kv_heads']}")
    if kind == "in-block" and (odd := [length for length in lengths if length % sizes["block"]]):
        raise UserError(f"--length {odd[0]} is no multiple of --block {sizes['block']}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    check_plot(plot)
    from bitlm_dist.bench import kernels
    from bitlm_dist.bench.results import environment_of
    from bitlm_dist.kernels.bench import Shape, device_of

    number = dtype or ("bfloat16" if device_of().type == "cuda" else "float32")
    shapes = [Shape(length=length, dtype=number, **sizes) for length in lengths]
    many = kernels.bench_kernels(kind, shapes, repeats, backends or [])
    if out:
        kernels.save(many, out)
    if plot:
        kernels.plot(many, plot)
    if as_json:
        print(kernels.results_json(many))
        return
    for results in many:
        show_table(f"bench {kind}", *results.table())
    environment = environment_of()
    shown = ", ".join(f"{name} {value}" for name, value in sizes.items())
    say(f"{shown}, {number}, {repeats} repeats; {environment['device']}, {environment['threads']} threads")


@bench.command("show")
def show_command(
    files: Annotated[list[Path], path_argument("RESULTS…", "Files that --out wrote.")],
    plot: Plot = None,
) -> None:
    """Print saved results again, or draw several in one plot."""
    from bitlm_dist.bench.results import plot as draw
    from bitlm_dist.bench.results import read_results

    check_plot(plot)
    many = [read_results(file) for file in files]
    for results in many:
        _print(results)
    if plot:
        draw(many, plot)


def _checked(words: list[str] | None, against: list[str] | None, limits: dict[str, tuple[int, int]], plot: Path | None) -> Config:
    for name in against or []:
        if name not in AGAINST:
            raise UserError(f"--vs {name}: compare with {' or '.join(AGAINST)}")
    for option, (value, least) in limits.items():
        if value < least:
            raise UserError(f"{option} {value}: must be at least {least}")
    check_plot(plot)
    return config_of(words or []).config


def _vocabulary_of(config: Config, asked: int | None) -> tuple[int, int, bool]:
    """-> V, eos, and whether the config's data is read."""
    from bitlm_dist.data.manifest import read_manifest

    if asked is not None:
        if asked < 4:
            raise UserError(f"--vocabulary {asked}: must be at least 4")
        return asked, 1, False
    if config.data.path is not None:
        manifest = read_manifest(config.data.path)
        return int(manifest["vocabulary"]), int(manifest["eos"]), True
    if config.model.bits is not None:
        return 2**config.model.bits, 1, False
    raise UserError("how many tokens are there? add --vocabulary V, --data.path FOLDER or --model.bits B")


def _report(results: "Results", out: Path | None, plot: Path | None, as_json: bool) -> None:
    from bitlm_dist.bench.results import plot as draw

    if out:
        results.save(out)
    if plot:
        draw([results], plot)
    if as_json:
        print(results.to_json())
    else:
        _print(results)


def _print(results: "Results") -> None:
    from bitlm_dist.bench.results import table_of

    columns, rows = table_of(results)
    show_table(f"bench {results.kind}", columns, rows)
    device, threads = results.environment["device"], results.environment["threads"]
    say(", ".join(f"{name} {value}" for name, value in results.settings.items()) + f"; {device}, {threads} threads")
