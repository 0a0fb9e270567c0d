"""Token codes of a run.

They are made once from the prepared folder, and then kept in the run folder beside the tokenizer.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitlm_dist import codes
from bitlm_dist.codes import BitCodes, num_bits_needed
from bitlm_dist.data.manifest import check_file
from bitlm_dist.errors import UserError
from bitlm_dist.model.config import ModelConfig

STATISTICS_FILE = "statistics.npz"


def make_codes(model: ModelConfig, folder: Path, manifest: dict[str, Any]) -> BitCodes:
    """Assign codes to the tokens of a prepared folder's tokenizer, by the scheme ``model.codes``.

    Raises:
        UserError: The vocabulary has more tokens than there are codes (V > 2^B), or the folder's
            tokenizer or statistics are missing or do not match the manifest.
    """
    vocab_size = int(manifest["vocabulary"])
    bits = model.bits or num_bits_needed(vocab_size)
    if vocab_size > 2**bits:
        raise UserError(
            f"model.bits = {bits} gives {2**bits:,} codes, too few for the tokenizer's "
            f"{vocab_size:,} tokens: use {num_bits_needed(vocab_size)} or leave it out"
        )

    # With another tokenizer or other counts, codes would be assigned to the wrong tokens.
    for name in (
        f"tokenizer/{manifest['tokenizer']['file']}",
        *_extra_tokenizer_files(manifest),
        STATISTICS_FILE,
    ):
        check_file(folder, manifest, name)

    return BitCodes(_assign_codes(model.codes, vocab_size, bits, folder / STATISTICS_FILE), bits)


def _extra_tokenizer_files(manifest: dict[str, Any]) -> list[str]:
    """List the tokenizer's files besides its vocabulary, e.g. tokenizer_config.json."""
    vocabulary_file = f"tokenizer/{manifest['tokenizer']['file']}"
    return [
        name
        for name in manifest["files"]
        if name.startswith("tokenizer/") and name != vocabulary_file
    ]


def _assign_codes(scheme: str, vocab_size: int, bits: int, statistics: Path) -> Tensor:
    if scheme == "natural":
        return codes.natural_codes(vocab_size)
    if scheme == "gray":
        return codes.gray_codes(vocab_size)
    if scheme == "random":
        return codes.random_codes(vocab_size, bits, seed=0)

    # The other schemes use statistics of the training split.
    with np.load(statistics) as arrays:
        counts = torch.from_numpy(arrays["counts"])
        return (
            codes.frequency_codes(counts)
            if scheme == "frequency"
            else codes.octave_codes(counts, torch.from_numpy(arrays["contexts"]))
        )
