"""The code of each token for a run: made once from the prepared folder, kept in the run folder beside the tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitlm_dist import codes
from bitlm_dist.codes import BitCodes, bits_needed
from bitlm_dist.config import ModelConfig
from bitlm_dist.data.manifest import check_file
from bitlm_dist.errors import UserError

STATISTICS = "statistics.npz"


def make_codes(model: ModelConfig, folder: Path, manifest: dict[str, Any]) -> BitCodes:
    """The assignment that ``model.codes`` names, for the tokenizer of a prepared folder.

    Raises:
        UserError: V > 2^B, or the folder's tokenizer or statistics are missing or not those of the manifest.
    """
    vocabulary = int(manifest["vocabulary"])
    bits = model.bits or bits_needed(vocabulary)
    if vocabulary > 2**bits:
        raise UserError(
            f"model.bits = {bits} gives {2**bits:,} codes, too few for the tokenizer's {vocabulary:,} tokens: "
            f"use {bits_needed(vocabulary)} or leave it out"
        )
    for name in (f"tokenizer/{manifest['tokenizer']['file']}", *_beside_it(manifest), STATISTICS):
        check_file(folder, manifest, name)
    return BitCodes(_assignment(model.codes, vocabulary, bits, folder / STATISTICS), bits)


def _beside_it(manifest: dict[str, Any]) -> list[str]:
    """Files of the tokenizer beside its vocabulary: a tokenizer_config.json, which names BOS and EOS."""
    vocabulary = f"tokenizer/{manifest['tokenizer']['file']}"
    return [name for name in manifest["files"] if name.startswith("tokenizer/") and name != vocabulary]


def _assignment(kind: str, vocabulary: int, bits: int, statistics: Path) -> Tensor:
    if kind == "natural":
        return codes.natural(vocabulary)
    if kind == "gray":
        return codes.gray(vocabulary)
    if kind == "random":
        return codes.random(vocabulary, bits, seed=0)
    with np.load(statistics) as found:
        counts = torch.from_numpy(found["counts"])
        return codes.frequency(counts) if kind == "frequency" else codes.octave(counts, torch.from_numpy(found["contexts"]))
