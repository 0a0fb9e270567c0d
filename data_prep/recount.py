"""Add the bytes of the tokens to the manifest of an older folder, whose text is gone."""

import json
from pathlib import Path
from typing import Any

from bitlm_dist.data.manifest import MANIFEST, SPLITS, read_manifest
from bitlm_dist.data_prep import mds, round_trip
from bitlm_dist.data_prep.output_units import token_dtype
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.data_prep.tokenizer import TOKENIZER_DIR, Tokenizer
from bitlm_dist.files import write_atomically
from bitlm_dist.strict_json import to_json


def write_token_bytes(folder: Path) -> dict[str, Any]:
    """Recount the bytes of all tokens of a prepared folder and write them to its manifest.

    No document can be compared with its text. The tokenizer counts as lossless if the bytes of
    both splits agree and it preserves upper case.

    Args:
        folder: A complete folder, see `bitlm data verify`.

    Returns:
        The updated manifest.

    Raises:
        UserError: The folder is not ready.
    """
    manifest = read_manifest(folder)
    tokenizer = Tokenizer.from_folder(folder / TOKENIZER_DIR)
    dtype = token_dtype(manifest["vocabulary"])
    for split in SPLITS:
        sizes = manifest["splits"][split]
        sizes["token_bytes"] = (
            _count_token_bytes(folder / split, dtype, tokenizer.byte_lengths)
            if sizes["documents"]
            else 0
        )

    # A newer folder was checked against its text; that result is kept.
    if "round_trip" not in manifest:
        is_equal = all(
            sizes["token_bytes"] == sizes["bytes"] for sizes in manifest["splits"].values()
        )
        empty = round_trip.sum_results([])
        manifest["round_trip"] = {**empty, "lossless": is_equal and not tokenizer.folds_case()}

    write_atomically(folder / MANIFEST, to_json(manifest, indent=1) + "\n")
    return manifest


def _count_token_bytes(split: Path, dtype: str, byte_lengths: ByteLengths) -> int:
    """Sum the bytes of all tokens of a split."""
    total = 0
    for shard in json.loads((split / "index.json").read_text())["shards"]:
        documents = list(mds.read_documents(split / shard["zip_data"]["basename"], dtype))
        total += int(byte_lengths.of_documents(documents).sum())
    return total
