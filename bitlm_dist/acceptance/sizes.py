"""Sizes of the acceptance run: those of a real card, and tiny ones that a CPU does in a minute."""

from dataclasses import dataclass

CONFIG = "bitlm-0.6b"
RECIPES = {
    "default": ("--preset", "default"),
    "paper": ("--preset", "paper"),
    "softmax": (
        *("--preset", "default"),
        *("--model.output", "softmax"),
        *("--model.block_size", "1"),
    ),
}
BLOCK_SIZES = (1, 2, 4, 8, 16)
INSIDE_BLOCKS = "inside-blocks"  # the kernel that is checked beside the attention backends


@dataclass(frozen=True)
class Sizes:
    """What differs between a real card and the run on a CPU.

    Attributes:
        device: ``gpu`` or ``cpu``.
        total_seconds: limit of the whole run on one card, and on several.
        patience: factor on the limits of the checks; a CPU is shared and slow.
        vocab_size: number of tokens.
        num_documents: documents of the sample text to prepare; None: all.
        model: overrides of CONFIG for the recipes.
        small: overrides of CONFIG for the checks that compare losses.
        precision: of the recipes and of the resumed run.
        tokens_per_step: of the recipes.
        steps: of the recipes.
        compared_steps: of the runs whose losses are compared: all of them, between two checkpoints,
            and before the kill, which comes after the first checkpoint.
        attention_bench: options of `bitlm bench attention`.
        generation: tokens and prompt tokens per text, and repeats.
        dtypes: names of the dtypes in which the kernels are checked.
        head_dims: head dimensions of these checks.
        layouts: overrides of the two-card checks, by name.
    """

    device: str
    total_seconds: tuple[float, float]
    patience: float
    vocab_size: int
    num_documents: int | None
    model: tuple[str, ...]
    small: tuple[str, ...]
    precision: str
    tokens_per_step: int
    steps: int
    compared_steps: tuple[int, int, int]
    attention_bench: tuple[str, ...]
    generation: tuple[int, int, int]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    layouts: dict[str, tuple[str, ...]]


def _shape(layers: int, width: int, head_dim: int, length: int) -> tuple[str, ...]:
    """Overrides of CONFIG that make it small."""
    values = {
        "data.sequence_length": length,
        "model.backbone.num_layers": layers,
        "model.backbone.hidden_size": width,
        "model.backbone.num_heads": 4,
        "model.backbone.num_kv_heads": 2,
        "model.backbone.head_dim": head_dim,
        "model.backbone.ffn_hidden_size": 2 * width,
        "head.num_layers": 2,
        "head.hidden_size": width,
        "head.num_heads": 2,
    }
    return tuple(word for key, value in values.items() for word in (f"--{key}", str(value)))


TENSOR = ("--parallel.tensor", "2", "--parallel.sequence", "true")
SIZES = {
    "gpu": Sizes(
        device="gpu",
        total_seconds=(600.0, 900.0),
        patience=1.0,
        vocab_size=151_936,
        num_documents=None,
        model=(),
        small=_shape(4, 256, 64, 256),
        precision="bf16",
        tokens_per_step=2 * 16_384,
        steps=20,
        compared_steps=(100, 10, 12),
        attention_bench=(
            *("--length", "4096", "--length", "8192", "--batch", "1", "--heads", "16"),
            *("--kv-heads", "8", "--width", "128", "--dtype", "bfloat16", "--repeats", "3"),
        ),
        generation=(64, 64, 2),
        dtypes=("bfloat16", "float32"),
        head_dims=(64, 128),
        layouts={"TP2": TENSOR, "DP2": ()},
    ),
    "cpu": Sizes(
        device="cpu",
        total_seconds=(3600.0, 3600.0),
        patience=10.0,
        vocab_size=300,
        num_documents=150,
        model=_shape(2, 32, 16, 64),
        small=_shape(2, 32, 16, 64),
        precision="fp32",
        tokens_per_step=256,
        steps=4,
        compared_steps=(12, 4, 5),
        attention_bench=(
            *("--length", "128", "--batch", "1", "--heads", "2"),
            *("--width", "16", "--repeats", "1"),
        ),
        generation=(8, 8, 1),
        dtypes=("float32",),
        head_dims=(32,),
        layouts={"TP2": TENSOR},
    ),
}
