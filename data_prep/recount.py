"""Adds to the manifest of an older folder what its tokens stand for, without its text."""

import json
from pathlib import Path
from typing import Any

from bitlm_dist.data_prep import mds, round_trip
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.data_prep.tokenizer import TOKENIZER, Tokenizer
from bitlm_dist.data_prep.units import dtype_of

from bitlm_dist.data.manifest import MANIFEST, SPLITS, read_manifest
from bitlm_dist.files import to_json, write_atomically


def write_token_bytes(folder: Path) -> dict[str, Any]:
    """Count the bytes of all tokens of a prepared folder again and write them to its manifest.

    The text is gone, so no document can be compared with it. The tokenizer counts as one that gives the text back if the bytes of
    both splits agree and it keeps upper case.

    Args:
        folder: whole, see `bitlm data verify`.

    Returns:
        The manifest as it is now.

    Raises:
        UserError: the folder is not ready.
    """
    manifest = read_manifest(folder)
    tokenizer = Tokenizer.of_folder(folder / TOKENIZER)
    dtype = dtype_of(manifest["vocabulary"])
    for split in SPLITS:
        sizes = manifest["splits"][split]
        sizes["token_bytes"] = _count(folder / split, dtype, tokenizer.byte_lengths) if sizes["documents"] else 0
    if "round_trip" not in manifest:
        equal = all(sizes["token_bytes"] == sizes["bytes"] for sizes in manifest["splits"].values())
        nothing = round_trip.summed([])
        manifest["round_trip"] = {**nothing, "lossless": equal and not tokenizer.folds_case()}
    write_atomically(folder / MANIFEST, to_json(manifest, indent=1) + "\n")
    return manifest


def _count(split: Path, dtype: str, byte_lengths: ByteLengths) -> int:
    total = 0
    for shard in json.loads((split / "index.json").read_text())["shards"]:
        documents = list(mds.read_documents(split / shard["zip_data"]["basename"], dtype))
        total += int(byte_lengths.of_documents(documents).sum())
    return total
