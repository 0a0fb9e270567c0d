"""Check that bits per byte refer to the bytes of the original text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bitlm_dist.data_prep.tokenizer import Tokenizer


class ByteCheck(NamedTuple):
    """Result of checking a byte count.

    Attributes:
        note: why bits per byte are approximate or unverified; None: they are those of the text.
        contradicts_manifest: the manifest has a different count, so it was written for other shards
            or another tokenizer.
    """

    note: str | None
    contradicts_manifest: bool = False


def check_byte_count(
    folder: Path, manifest: Mapping[str, Any], split: str, num_bytes: int, is_full_split: bool
) -> ByteCheck:
    """Compare a byte count with the manifest.

    Args:
        folder: the prepared data folder, for messages and for its tokenizer.
        manifest: manifest of the folder.
        split: name of the evaluated split.
        num_bytes: number of bytes that its tokens stand for.
        is_full_split: True if the count covers the full split.
    """
    remedy = f"`bitlm data verify {folder} --write` adds it"
    expected = manifest["splits"][split].get("token_bytes")

    # Older manifests lack the count: compare with the size of the text instead.
    if expected is None:
        text = manifest["splits"][split]["bytes"]
        if not is_full_split:
            return ByteCheck(
                f"{folder}/manifest.json does not say whether its tokenizer gives the text back: "
                f"{remedy}"
            )
        if num_bytes != text:
            return ByteCheck(
                f"the {split} tokens stand for {num_bytes:,} bytes, the text had {text:,}: "
                "the tokenizer does not give the text back, or an older bitlm applied the "
                "truncation or padding that its file asks for: then prepare the data again; "
                f"{folder}/manifest.json does not have the count: {remedy}"
            )

        # folded case changes the text, but hardly its size
        if Tokenizer.from_folder(folder / "tokenizer").folds_case():
            return ByteCheck("the tokenizer does not keep upper case")
        return ByteCheck(None)

    if is_full_split and num_bytes != expected:
        return ByteCheck(
            f"the {split} tokens stand for {num_bytes:,} bytes, "
            f"{folder}/manifest.json has {expected:,}: "
            f"hash the folder with `bitlm data verify {folder}`",
            contradicts_manifest=True,
        )

    return ByteCheck(_round_trip_note(manifest, split))


def _round_trip_note(manifest: Mapping[str, Any], split: str) -> str | None:
    """Describe a lossy tokenizer from the round trip in the manifest; None: it is lossless."""
    round_trip = manifest["round_trip"]
    sizes = manifest["splits"][split]
    if round_trip["lossless"]:
        return None

    share = 100 * sizes["token_bytes"] / max(1, sizes["bytes"])
    lost = (
        f", {100 * round_trip['lost'] / round_trip['characters']:.3g} % of the characters are lost"
        if round_trip["characters"]
        else ""
    )
    return (
        "the tokenizer does not give every text back: "
        f"its tokens stand for {share:.2f} % of the bytes{lost}"
    )
