"""The command `bitlm bench`. Heavy imports are deferred until a benchmark runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitlm_dist.cli.console import (
    OVERRIDES,
    AsJson,
    ConfigWords,
    check_output_file,
    check_plot,
    load_config_from_words,
    path_argument,
    path_option,
    print_line,
    print_table,
)
from bitlm_dist.cli.progress import work_progress
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError

if TYPE_CHECKING:
    from bitlm_dist.bench.results import Results

BASELINES = ("softmax", "plain")
DTYPES = ("float32", "float16", "bfloat16")

bench = typer.Typer(
    no_args_is_help=True,
    help="Compare speed and memory of models or kernels in one run; times are medians of repeats.",
)
Baselines = Annotated[
    list[str] | None,
    typer.Option("--vs", metavar="|".join(BASELINES), help="Baseline to compare; may be repeated."),
]
Repeats = Annotated[int, typer.Option(help="Timed repeats per model or kernel, interleaved.")]
Vocabulary = Annotated[
    int | None, typer.Option(help="Vocabulary size (V); default: that of data.path's tokenizer.")
]
Out = Annotated[Path | None, path_option("--out", "Save the results as JSON.", "FILE")]
Plot = Annotated[Path | None, path_option("--plot", "Plot them: .svg, .png or .pdf.", "FILE")]


@bench.command("train", context_settings=OVERRIDES)
def train_command(
    words: ConfigWords = None,
    baselines: Baselines = None,
    vocabulary: Vocabulary = None,
    repeats: Repeats = 5,
    steps: Annotated[int, typer.Option(help="Training steps per repeat.")] = 4,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure whole training steps.

    Uses the config's data, or synthetic text with --vocabulary or without data.path.
    """
    limits = {"--repeats": (repeats, 1), "--steps": (steps, 1)}
    config = _load_config(words, baselines, limits, out, plot)
    vocab_size, eos, has_data = _resolve_vocabulary(config, vocabulary)

    # after the options were checked, as it loads torch
    with work_progress("starting"):
        from bitlm_dist.bench.train import Workload, bench_train

    workload = Workload(vocab_size, eos, has_data, steps)
    results = bench_train(config, workload, baselines or [], repeats, work_progress)
    _output_results(results, out, plot, as_json)


@bench.command("generate", context_settings=OVERRIDES)
def generate_command(
    words: ConfigWords = None,
    baselines: Baselines = None,
    vocabulary: Vocabulary = None,
    sampler: Annotated[
        list[str] | None, typer.Option(help="sequential, ode:K or sde:K; may be repeated.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Number of texts to generate at once.")] = 1,
    tokens: Annotated[int, typer.Option(help="New tokens per text.")] = 64,
    prompt: Annotated[int, typer.Option(help="Prompt tokens per text.")] = 64,
    repeats: Repeats = 5,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure generation by an untrained model with a key-value cache."""
    limits = {
        "--repeats": (repeats, 1),
        "--batch": (batch, 1),
        "--tokens": (tokens, 1),
        "--prompt": (prompt, 0),
    }
    config = _load_config(words, baselines, limits, out, plot)
    vocab_size, _, _ = _resolve_vocabulary(config, vocabulary)

    with work_progress("starting"):
        from bitlm_dist.bench.generate import GenerationWorkload, bench_generate

    workload = GenerationWorkload(vocab_size, batch, tokens, prompt)
    results = bench_generate(
        config, workload, baselines or [], sampler or [], repeats, work_progress
    )
    _output_results(results, out, plot, as_json)


@bench.command("data", context_settings=OVERRIDES)
def data_command(
    words: ConfigWords = None,
    repeats: Repeats = 5,
    batches: Annotated[int, typer.Option(help="Batches per repeat.")] = 50,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure reading and packing of the config's data, beside what training consumes.

    Cold is a folder just opened, warm the same folder read again.
    """
    limits = {"--repeats": (repeats, 1), "--batches": (batches, 1)}
    config = _load_config(words, None, limits, out, None)
    if config.data.path is None:
        raise UserError("data.path is not set: add --data.path FOLDER")
    vocab_size, eos, _ = _resolve_vocabulary(config, None)

    with work_progress("starting"):
        from bitlm_dist.bench.data import bench_data
        from bitlm_dist.bench.train import Workload

    workload = Workload(vocab_size, eos, True, 1)
    results = bench_data(config, workload, batches, repeats, work_progress)
    _output_results(results, out, None, as_json)


Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", help="Sequence length; may be repeated. Default: 1024."),
]
BatchSize = Annotated[int, typer.Option(help="Number of sequences.")]
Heads = Annotated[int, typer.Option(help="Number of query heads.")]
HeadDim = Annotated[int, typer.Option("--width", help="Dimension of each head.")]
BlockSize = Annotated[int, typer.Option("--block", help="Tokens per block (m).")]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(DTYPES)}; default: bfloat16 on a GPU, float32 on a CPU."),
]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", help="Backend; may be repeated. Default: all that run here."),
]


@bench.command("attention")
def attention_command(
    length: Lengths = None,
    batch: BatchSize = 2,
    heads: Heads = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key-value heads; default: --heads.")] = None,
    head_dim: HeadDim = 64,
    block: BlockSize = 4,
    documents: Annotated[int, typer.Option(help="Documents of equal length per sequence.")] = 1,
    dtype: Dtype = None,
    backend: Backends = None,
    repeats: Repeats = 5,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure block-causal attention, forward and backward.

    Compares the backends with causal flash attention and with SDPA under a dense mask.
    """
    num_kv_heads = heads if kv_heads is None else kv_heads
    sizes = {
        "batch": batch,
        "heads": heads,
        "kv_heads": num_kv_heads,
        "width": head_dim,
        "block": block,
        "documents": documents,
    }
    _run_kernel_bench("attention", length, sizes, dtype, backend, repeats, out, plot, as_json)


@bench.command("in-block")
def in_block_command(
    length: Lengths = None,
    batch: BatchSize = 8,
    heads: Heads = 4,
    head_dim: HeadDim = 64,
    block: BlockSize = 4,
    dtype: Dtype = None,
    backend: Backends = None,
    repeats: Repeats = 5,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure attention inside blocks, forward and backward.

    Compares the backends with SDPA over a batch of blocks and a copy of the same number of bytes.
    """
    sizes = {"batch": batch, "heads": heads, "kv_heads": heads, "width": head_dim, "block": block}
    _run_kernel_bench("in-block", length, sizes, dtype, backend, repeats, out, plot, as_json)


def _run_kernel_bench(
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
    """Run a kernel benchmark and print its results."""
    lengths = lengths or [1024]
    _check_kernel_options(kind, lengths, sizes, dtype, repeats)
    check_output_file("--out", out)
    check_plot(plot)

    with work_progress("starting"):
        from bitlm_dist.bench import kernels
        from bitlm_dist.kernels.bench import AttentionShape, default_device

    dtype_name = dtype or ("bfloat16" if default_device().type == "cuda" else "float32")
    shapes = [AttentionShape(length=length, dtype=dtype_name, **sizes) for length in lengths]
    with work_progress("measuring", len(shapes) * repeats, "repeats", animated=False) as advance:
        all_results = kernels.bench_kernels(kind, shapes, repeats, backends or [], advance)

    # printed before they are saved, which may fail although it was tried
    if as_json:
        print(kernels.results_to_json(all_results))
    else:
        for results in all_results:
            print_table(f"bench {kind}", *results.table())
        print_line(kernels.settings_line(all_results[0].shape, sizes, repeats))

    if out:
        kernels.save_kernel_results(all_results, out)
    if plot:
        kernels.plot_kernel_results(all_results, plot)


def _check_kernel_options(
    kind: str, lengths: list[int], sizes: dict[str, int], dtype: str | None, repeats: int
) -> None:
    for name, value in {**sizes, "length": min(lengths), "repeats": repeats}.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")

    if sizes["heads"] % sizes["kv_heads"]:
        raise UserError(
            f"--heads {sizes['heads']} is no multiple of --kv-heads {sizes['kv_heads']}"
        )
    # in-block attention has no partial blocks
    if kind == "in-block" and (odd := [length for length in lengths if length % sizes["block"]]):
        raise UserError(f"--length {odd[0]} is no multiple of --block {sizes['block']}")
    documents = sizes.get("documents", 1)
    if odd := [length for length in lengths if length % documents]:
        raise UserError(
            f"--length {odd[0]} is no multiple of --documents {documents}, which are equally long"
        )
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")


@bench.command("show")
def show_command(
    files: Annotated[list[Path], path_argument("RESULTS…", "Files written by --out.")],
    plot: Plot = None,
) -> None:
    """Print saved results, or plot several together."""
    from bitlm_dist.bench.results import plot_results, read_results

    check_plot(plot)
    all_results = [read_results(file) for file in files]
    for results in all_results:
        _print_results(results)
    if plot:
        plot_results(all_results, plot)


def _load_config(
    words: list[str] | None,
    baselines: list[str] | None,
    limits: dict[str, tuple[int, int]],
    out: Path | None,
    plot: Path | None,
) -> Config:
    """Check the options and load the config.

    Args:
        words: config file and overrides.
        baselines: values of --vs.
        limits: value and minimum of every numeric option, by its name.
        out: value of --out.
        plot: value of --plot.
    """
    for name in baselines or []:
        if name not in BASELINES:
            raise UserError(f"--vs {name}: compare with {' or '.join(BASELINES)}")

    for option, (value, minimum) in limits.items():
        if value < minimum:
            raise UserError(f"{option} {value}: must be at least {minimum}")

    check_output_file("--out", out)
    check_plot(plot)
    return load_config_from_words(words or []).config


def _resolve_vocabulary(config: Config, requested: int | None) -> tuple[int, int, bool]:
    """Find the vocabulary to measure with.

    Args:
        config: its data.path or model.bits determine the vocabulary if none is requested.
        requested: value of --vocabulary.

    Returns:
        Vocabulary size V, eos id, and whether the config's data is to be read.
    """
    from bitlm_dist.data.manifest import read_manifest

    if requested is not None:
        if requested < 4:
            raise UserError(f"--vocabulary {requested}: must be at least 4")
        return requested, 1, False

    # Without a tokenizer any id will do as eos.
    if config.data.path is not None:
        manifest = read_manifest(config.data.path)
        return int(manifest["vocabulary"]), int(manifest["eos"]), True
    if config.model.bits is not None:
        return 2**config.model.bits, 1, False

    raise UserError(
        "how many tokens are there? add --vocabulary V, --data.path FOLDER or --model.bits B"
    )


def _output_results(results: "Results", out: Path | None, plot: Path | None, as_json: bool) -> None:
    """Print, save and plot results, as the options say."""
    from bitlm_dist.bench.results import plot_results

    # printed before they are saved, which may fail although it was tried
    if as_json:
        print(results.to_json())
    else:
        _print_results(results)

    if out:
        results.save(out)
    if plot:
        plot_results([results], plot)


def _print_results(results: "Results") -> None:
    from bitlm_dist.bench.results import results_table, settings_line

    print_table(f"bench {results.kind}", *results_table(results))
    print_line(settings_line(results))
