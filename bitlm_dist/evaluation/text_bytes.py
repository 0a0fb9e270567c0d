"""Whether bits per byte are bits per byte of the text: what is known of the tokenizer, and the count over a whole split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bitlm_dist.data_prep.tokenizer import Tokenizer


class ByteCheck(NamedTuple):
    """What to know about a count of bytes.

    Attributes:
        note: why bits per byte are approximate or unproven; None: they are those of the text.
        contradicts: the manifest has another count, so the shards or the tokenizer are not those that it was written for.
    """

    note: str | None
    contradicts: bool = False


def check_bytes(folder: Path, manifest: Mapping[str, Any], split: str, counted: int, whole: bool) -> ByteCheck:
    """Compare a count of bytes with the manifest.

    Args:
        folder: the prepared folder, for messages and for its tokenizer.
        manifest: of the folder.
        split: that was evaluated.
        counted: bytes that its tokens stand for.
        whole: whether all of the split was counted.
    """
    remedy = f"`bitlm data verify {folder} --write` adds it"
    expected = manifest["splits"][split].get("token_bytes")
    if expected is None:
        text = manifest["splits"][split]["bytes"]
        if not whole:
            return ByteCheck(f"{folder}/manifest.json does not say whether its tokenizer gives the text back: {remedy}")
        if counted != text:
            return ByteCheck(
                f"the {split} tokens stand for {counted:,} bytes, the text had {text:,}: the tokenizer does not give the text "
                "back, or an older bitlm applied the truncation or padding that its file asks for: then prepare the data again; "
                f"{folder}/manifest.json does not have the count: {remedy}"
            )
        if Tokenizer.of_folder(folder / "tokenizer").folds_case():
            return ByteCheck("the tokenizer does not keep upper case")
        return ByteCheck(None)
    if whole and counted != expected:
        return ByteCheck(
            f"the {split} tokens stand for {counted:,} bytes, {folder}/manifest.json has {expected:,}: "
            f"hash the folder with `bitlm data verify {folder}`",
            contradicts=True,
        )
    return ByteCheck(_note_of_manifest(manifest, split))


def _note_of_manifest(manifest: Mapping[str, Any], split: str) -> str | None:
    found, sizes = manifest["round_trip"], manifest["splits"][split]
    if found["lossless"]:
        return None
    share = 100 * sizes["token_bytes"] / max(1, sizes["bytes"])
    lost = f", {100 * found['lost'] / found['characters']:.3g} % of the characters are lost" if found["characters"] else ""
    return f"the tokenizer does not give every text back: its tokens stand for {share:.2f} % of the bytes{lost}"
