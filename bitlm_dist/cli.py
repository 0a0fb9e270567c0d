"""The command `bitlm`. Heavy imports wait until a command needs them, so that --help and errors come at once."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlm_dist import config_loading
from bitlm_dist.bench.command import bench
from bitlm_dist.checkpoints import checkpoints
from bitlm_dist.config import Config, warnings_of
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.values import ratio_of, shown
from bitlm_dist.files import to_json
from bitlm_dist.launching import launching
from bitlm_dist.prepared import prepared
from bitlm_dist.terminal import (
    OVERRIDES,
    AsJson,
    Run,
    Words,
    check_plot,
    config_of,
    console,
    expanded_path,
    path_argument,
    path_option,
    say,
    show_table,
)

if TYPE_CHECKING:
    from bitlm_dist.cpu_threads import BusyCores
    from bitlm_dist.launch.heartbeat import Heartbeat
    from bitlm_dist.model.language_model import LanguageModel
    from bitlm_dist.parallel.layout import Layout

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain language models that write a block of tokens at once, as bits, by diffusion.",
)
app.add_typer(bench, name="bench")
app.add_typer(checkpoints, name="checkpoint")
app.add_typer(prepared, name="data")
app.add_typer(launching, name="launch")


@app.command()
def prep(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|DIR|URL…",
            help=".txt, .jsonl, .ndjson, .json, .csv, .tsv or .parquet, plain or .gz, .bz2, .xz, .zst; paths, or s3://, gs://, https://…",
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="tokenizer.json, .tiktoken, tekken or SentencePiece .model file, a folder that holds one, package:NAME:FILE, or "
            "bpe:SIZE to train one."
        ),
    ],
    out: Annotated[Path, path_option("--out", "Folder to write.", "DIR")],
    validation: Annotated[float, typer.Option(help="Share of documents to hold out; of a lone document, its end.")] = 0.05,
    field: Annotated[str, typer.Option(help="JSON key or column of the text; a.b for key b of object a.")] = "text",
    document_separator: Annotated[
        str | None, typer.Option(metavar="TEXT", help=r"Between the documents of a .txt file; \n is a line break, \t a tab.")
    ] = None,
    min_chars: Annotated[int, typer.Option(help="Drop shorter documents.")] = 1,
    max_chars: Annotated[int, typer.Option(help="Drop longer documents; 0: none, and memory has no bound.")] = 5_000_000,
    exact_dedup: Annotated[bool, typer.Option(help="Drop copies of earlier documents.")] = True,
    near_dedup: Annotated[float | None, typer.Option(help="Drop documents this similar to an earlier one, e.g. 0.8.")] = None,
    decontaminate: Annotated[
        list[Path] | None,
        path_option("--decontaminate", "Evaluation text that must not be trained on; repeat for more files.", "FILE"),
    ] = None,
    hit_ratio: Annotated[float, typer.Option(help="Share of a document's 13-grams found there from which it is dropped.")] = 0.1,
    language: Annotated[str | None, typer.Option(help="Keep documents in this language only, e.g. en.")] = None,
    language_probability: Annotated[float, typer.Option(help="How sure of it the detector must be.")] = 0.5,
    on_error: Annotated[str, typer.Option(help="At a bad line: stop, or skip and count it.")] = "stop",
    unit_mb: Annotated[int, typer.Option(help="Megabytes of text in a shard; more for a corpus of terabytes.")] = 2,
    max_unpack_ratio: Annotated[
        int, typer.Option(help="How many times its size a compressed file may unpack to, beyond 100 MB; 0: any.")
    ] = 200,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the usable CPUs.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing while it runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Clean, deduplicate and tokenize text, and write it as shards; run it again after an interruption and it goes on."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads would spin beside the workers
    from bitlm_dist.data_prep.prepare import prepare
    from bitlm_dist.data_prep.settings import Settings
    from bitlm_dist.display import preparation_progress

    settings = Settings(
        field,
        min_chars,
        max_chars,
        exact_dedup,
        near_dedup,
        tuple(decontaminate or ()),
        hit_ratio,
        language,
        language_probability,
        on_error,
        unit_mb,
        document_separator and document_separator.replace(r"\n", "\n").replace(r"\t", "\t"),
        max_unpack_ratio,
    )
    silent = quiet or as_json
    sources = [source if "://" in source else expanded_path("FILE|DIR")(source) for source in sources]
    tokenizer = expanded_path("--tokenizer")(tokenizer)
    processes = len(os.sched_getaffinity(0)) if workers is None else workers
    try:
        with ExitStack() as stack:
            observe = None if silent else stack.enter_context(preparation_progress(console))
            notice = (lambda line: None) if silent else say
            report = prepare(sources, tokenizer, out, validation, settings, processes, observe, notice)
    except KeyboardInterrupt:
        say(f"{out} is not finished: the same command goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        print(to_json(asdict(report)))
    elif not quiet:
        say(
            f"{out}: {report.documents:,} documents, {report.tokens:,} tokens, {report.text_bytes / 1e6:.1f} MB of text in "
            f"{report.units} units ({report.units_reused} were there); unigram entropy {report.unigram_nats:.3f} nats a token; "
            f"dropped: {report.dropped_in_words}"
        )
        for warning in report.warnings:
            say(f"warning: {warning}")


@app.command(context_settings=OVERRIDES)
def train(
    words: Words = None,
    resume: Annotated[bool, typer.Option(help="Continue if the run folder holds a checkpoint.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build on the meta device, print the parameters, stop.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every value and its source, stop.")] = False,
) -> None:
    """Train, or go on training. Every key can be overridden: --training.steps 500 --model.block_size=8."""
    loaded = config_of(words or [])
    if print_config:
        values = dict(config_loading.flatten(loaded.config.model_dump(mode="json")))
        show_table("", ("key", "value", "from"), ((k, v, loaded.sources.get(k, "default")) for k, v in values.items()))
        return
    if dry_run:
        _dry_run(loaded.config)
        return
    from bitlm_dist.cpu_threads import BusyCores
    from bitlm_dist.launch.heartbeat import Heartbeat
    from bitlm_dist.launch.ranks import export_ranks, read_ranks

    ranks, busy_cores = read_ranks(os.environ), BusyCores()
    if ranks.world > 1:
        export_ranks(ranks, os.environ)
    with Heartbeat.of_environment(os.environ, ranks.rank, ranks.world) as heartbeat:
        from bitlm_dist.parallel.layout import layout_of

        layout = layout_of(loaded.config.parallel, ranks.world, ranks.rank)
        _train(loaded.config, resume, layout, heartbeat, busy_cores)


def _train(config: Config, resume: bool, layout: "Layout", heartbeat: "Heartbeat", busy_cores: "BusyCores") -> None:
    import torch

    from bitlm_dist.display import loss_chart, training_progress
    from bitlm_dist.launch import attempts
    from bitlm_dist.parallel.device import warning_of_unused_gpus
    from bitlm_dist.training.trainer import Trainer

    trainer = Trainer(config, resume, layout)
    heartbeat.watch(lambda: trainer.step)
    speaks = layout.rank == 0
    begun, steps = trainer.step, config.training.steps
    if trainer.done:
        trainer.close()
        trainer.check_end()
        if speaks:
            say(f"{config.run.dir} is trained: step {begun} of {steps}")
            attempts.report(os.environ, attempts.DONE, begun, "")
        return
    if speaks:
        parameters = f"{trainer.engine.parameters:,} parameters"
        say(f"{config.run.dir}: {parameters}, step {begun} of {steps}; attention by {trainer.attention}")
        say(trainer.feed.summary())
        say(_epochs_in_words(trainer.epochs_at_end(), config))
        if trainer.device.type == "cpu":
            for warning in (warning_of_unused_gpus(), busy_cores.warning(torch.get_num_threads())):
                if warning:
                    say(f"warning: {warning}")
        for warning in warnings_of(config):
            say(f"warning: {warning}")
    if trainer.device.type == "cuda":
        say(f"rank {layout.rank} on {socket.gethostname()}: {trainer.device}, {torch.cuda.get_device_name(trainer.device)}")
    with ExitStack() as stack:
        stack.callback(trainer.close)
        evaluator = stack.enter_context(_evaluator(config, training=True, speaks=speaks)) if config.evaluation.every_steps else None
        observe = stack.enter_context(training_progress(console, begun, steps)) if speaks else None
        trainer.fit(observe=observe, evaluate=evaluator)
    if speaks:
        outcome = attempts.DONE if trainer.done else attempts.STOPPED
        attempts.report(os.environ, outcome, trainer.step, trainer.stopped_by or "")
    if trainer.done and speaks:
        say(loss_chart(trainer.folder.losses()))
    if trainer.stopped_by and speaks:
        where = f"saved at step {trainer.step}" if trainer.step else "before the first step"
        say(f"{trainer.stopped_by}: {where}; the same command goes on from there")


def _epochs_in_words(epochs: Mapping[str, float], config: Config) -> str:
    assert config.data.path is not None
    every = ((key.partition("/")[2] or config.data.path.name, number) for key, number in epochs.items())
    return f"{config.training.steps:,} steps are " + ", ".join(f"{number:.3g} epochs of {name}" for name, number in every)


@contextmanager
def _evaluator(
    config: Config, split: str = "validation", *, training: bool = False, speaks: bool = False
) -> Iterator[Callable[["LanguageModel"], dict[str, Any]]]:
    """Yields what scores a model on a split of the config's data.

    The score has ``bytes_note``: why bits per byte are not those of the text, None where they are.

    Args:
        config: with ``data.path``.
        split: to read.
        training: go on if the bytes counted contradict the manifest, and note it; otherwise raise a UserError.
        speaks: print the first note.
    """
    from bitlm_dist.data.feed import Feed
    from bitlm_dist.data_prep.tokenizer import Tokenizer
    from bitlm_dist.evaluation.likelihood import evaluate as score
    from bitlm_dist.evaluation.text_bytes import check_bytes

    assert config.data.path is not None
    path, byte_lengths = config.data.path, Tokenizer.of_folder(config.data.path / "tokenizer").byte_lengths
    feed = Feed.of_config(config, split)

    def scored(model: "LanguageModel") -> dict[str, Any]:
        report = score(model, feed, byte_lengths, config.evaluation, config.sampling)
        whole = not 0 < config.evaluation.sequences < len(feed)
        check = check_bytes(path, feed.manifest, split, report.bytes, whole)
        if check.contradicts and not training:
            raise UserError(str(check.note))
        nonlocal speaks
        if check.note and speaks:
            say(f"warning: bits per byte are approximate: {check.note}")
            speaks = False
        return {**asdict(report), "bytes_note": check.note}

    try:
        yield scored
    finally:
        feed.close()


def _dry_run(config: Config) -> None:
    from bitlm_dist.codes import bits_needed
    from bitlm_dist.data.manifest import read_manifest
    from bitlm_dist.model.build import meta_model

    if config.data.path is not None and (config.model.bits is None or config.data.path.exists()):
        vocabulary = int(read_manifest(config.data.path)["vocabulary"])
    elif config.model.bits is not None:
        vocabulary = 2**config.model.bits
    else:
        raise UserError("--dry-run needs model.bits, or data.path to ask the tokenizer")
    bits = config.model.bits or bits_needed(vocabulary)
    model = meta_model(config, vocabulary, bits)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    counts["total"] = sum(p.numel() for p in model.parameters())  # a tied table counts once
    title = f"parameters, {bits} bits a token" if config.model.output == "bits" else f"parameters, {vocabulary:,} tokens"
    show_table(title, ("part", "parameters"), ((n, f"{c:,}") for n, c in counts.items()))


@app.command("eval", context_settings=OVERRIDES)
def evaluate(
    run: Run,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[--SECTION.KEY VALUE]…")] = None,
    split: Annotated[str, typer.Option(help="validation or train.")] = "validation",
    as_json: AsJson = False,
) -> None:
    """Score a run on held-out text: bits per byte (an upper bound), the checks beside it, the unigram entropy of the same text."""
    from bitlm_dist.data.manifest import SPLITS, read_manifest
    from bitlm_dist.training.weights import load_trained

    if split not in SPLITS:
        raise UserError(f"--split {split}: choose from {', '.join(SPLITS)}")
    config = config_loading.read_run(run, overrides or [])
    if config.data.path is None:
        raise UserError("data.path is not set in the run's config: add --data.path FOLDER")
    folder, model, step = load_trained(run, config)
    if read_manifest(config.data.path)["tokenizer"]["fingerprint"] != folder.tokenizer().fingerprint:
        raise UserError(f"data.path = {config.data.path} has another tokenizer than {run}: prepare it with {run}/tokenizer's file")
    with _evaluator(config, split) as score:
        report = score(model)
    if as_json:
        print(to_json({"run": str(run), "step": step, "split": split, **report}))
        return
    _show_report(f"{run}, step {step}, {split}", report)


def _show_report(title: str, report: Mapping[str, Any]) -> None:
    ratio = ratio_of(report["bits_per_byte"], report["unigram_bits_per_byte"])
    per_byte = "approximate bits per byte" if report.get("bytes_note") else "bits per byte"
    rows = [
        (
            f"{per_byte} ({'exact' if report['exact'] else 'bound'} ± s.e.)",
            f"{shown(report['bits_per_byte'])} ± {shown(report['bits_per_byte_se'])}",
        ),
        (f"unigram entropy, {per_byte}", shown(report["unigram_bits_per_byte"])),
        ("ratio to unigram entropy", shown(ratio)),
        ("nats per token", shown(report["nats_per_token"])),
        ("context-shuffle delta, nats per token", shown(report["context_shuffle_delta_nats"])),
        ("invalid-code rate", shown(report["invalid_code_rate"])),
        ("tokens, bytes", f"{report['tokens']:,}, {report['bytes']:,}"),
    ]
    if report["chain_bits_per_byte"] is not None:
        rows.insert(1, (f"{per_byte} (chain rule in the block)", shown(report["chain_bits_per_byte"])))
    if report["brier"]:
        rows.append(("Brier-1, -2, … of the next tokens", "  ".join(f"{score:.2f}" for score in report["brier"])))
    accuracy = report["accuracy_by_time"].items()
    if accuracy:
        rows.append(("bit accuracy at t", "  ".join(f"{t}: {100 * a:.1f}%" for t, a in accuracy)))
    show_table(title, ("measure", "value"), rows)
    if report.get("bytes_note"):
        say(f"warning: bits per byte are approximate: {report['bytes_note']}")


@app.command()
def compare(
    runs: Annotated[list[Path], path_argument("RUN…", "Run folders; ratios are to the first.")],
    plot: Annotated[Path | None, path_option("--plot", "Draw bits per byte over --axis: .svg, .png or .pdf.", "FILE")] = None,
    axis: Annotated[
        str | None,
        typer.Option(
            help="predicted_tokens (the default where all runs counted them), text_bytes, tokens, cpu_seconds or seconds."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, with the command of each run.")] = False,
) -> None:
    """Put runs side by side: bits per byte, its ratio to the first run, and cost, as training evaluated them."""
    from bitlm_dist.evaluation import compare as comparison

    check_plot(plot)
    if axis not in (None, *comparison.AXES):
        raise UserError(f"--axis {axis}: choose from {', '.join(comparison.AXES)}")
    records = [comparison.read_record(run) for run in runs]
    if plot:
        comparison.plot(records, comparison.axis_of(records, axis), plot)
    if markdown:
        print(comparison.markdown(records))
    else:
        show_table("", comparison.COLUMNS, comparison.rows_of(records))
        for note in comparison.notes(records):
            say(note)


@app.command(context_settings=OVERRIDES)
def generate(
    run: Run,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[--SECTION.KEY VALUE]…")] = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks to write at most.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise.")] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Show the bits of each block settle.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write text, block by block. The sampling section can be overridden: --sampling.steps 4."""
    from bitlm_dist.display import BitWatcher, TextStream
    from bitlm_dist.inference.generate import Progress, generate_blocks
    from bitlm_dist.training.weights import load_trained

    config = config_loading.read_run(run, overrides or [])
    folder, model, _ = load_trained(run, config)
    tokenizer = folder.tokenizer()
    ids = tokenizer.encode_batch([prompt])[0].tolist() if prompt else []
    progress, new = Progress(), []
    watcher = BitWatcher(console) if watch and not as_json else None
    stream = None if as_json else TextStream(lambda new: tokenizer.decode_after(ids, new), prompt)
    for part in generate_blocks(
        model,
        ids,
        bos=tokenizer.bos,
        blocks=blocks,
        sampling=config.sampling,
        seed=seed,
        progress=progress,
        watch=watcher,
    ):
        new += part
        if stream:
            stream.show(new)
    rate = progress.tokens / max(progress.seconds, 1e-9)
    if as_json:
        counts = {"backbone_passes": progress.backbone_passes, "head_passes": progress.head_passes}
        print(to_json({"text": tokenizer.decode_after(ids, new), "token_ids": new, **counts, "tokens_per_second": rate}))
    else:
        passes = f"{progress.backbone_passes} backbone and {progress.head_passes} head passes"
        console.print(f"\n[dim]{progress.tokens} tokens, {passes}, {rate:.0f} tokens/s[/dim]")


@app.command()
def doctor() -> None:
    """Print versions, device, and which back ends were found."""
    from bitlm_dist.doctor import examine

    for heading, findings in examine().items():
        rows = ((f.name, "yes" if f.found else "no", f.note) for f in findings)
        show_table(heading, ("name", "found", "note"), rows)
