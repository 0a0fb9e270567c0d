"""Whether a tokenizer gives a corpus back: the bytes of every document are added up, one document in a hundred is decoded in full.

Bits per byte are bits per byte of the text only if it does.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from bitlm_dist.data_prep.tokenizer import Tokenizer
from numpy.typing import NDArray

ONE_IN = 100  # documents are decoded in full
LEAST = 20  # of the corpus, however small it is
AROUND = 20  # characters shown on either side of a difference
COUNTS = ("documents", "other_bytes", "decoded", "changed", "characters", "lost")


def examine(
    texts: Sequence[bytes],
    hashes: Sequence[bytes],
    encoded: Sequence[NDArray[np.integer[Any]]],
    token_bytes: NDArray[np.int64],
    tokenizer: Tokenizer,
    before: int,
) -> dict[str, Any]:
    """Compare N documents of a unit with what their tokens stand for.

    Args:
        texts: UTF-8, N.
        hashes: SHA-256 of each text; chooses what is decoded.
        encoded: token ids of each, none empty.
        token_bytes: what those add up to, int64 [N].
        tokenizer: that made them.
        before: documents of the units before it.

    Returns:
        Counts by the names of ``COUNTS``: all documents, those whose tokens have other bytes than their text, decoded ones, those
        among them that changed, their characters, and how many of these were lost. ``first``: where the first mismatch is, or None.
    """
    found: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    wrong = token_bytes != np.fromiter(map(len, texts), np.int64, len(texts))
    found.update(documents=len(texts), other_bytes=int(wrong.sum()), first=None)
    chosen = _chosen(hashes, before)
    for i in sorted({*chosen, *wrong.nonzero()[0][:1].tolist()}):
        text, back = texts[i].decode(), tokenizer.decode(encoded[i].tolist())
        if i in chosen:
            found["decoded"] += 1
            found["characters"] += len(text)
        if text != back and i in chosen:
            found["changed"] += 1
            found["lost"] += (Counter(text) - Counter(back)).total()
        if found["first"] is None and (text != back or wrong[i]):
            found["first"] = _difference(text, back)
    return found


def _chosen(hashes: Sequence[bytes], before: int) -> set[int]:
    """Which documents of a unit, with ``before`` others before it, are decoded in full."""
    if not hashes:
        return set()
    draw = np.frombuffer(b"".join(hashes), "<u4").reshape(len(hashes), -1)[:, 2]  # the first 8 bytes hold documents out
    chosen = set((draw % ONE_IN == 0).nonzero()[0].tolist())
    return chosen | set(np.argsort(draw, kind="stable")[: LEAST - before].tolist()) if before < LEAST else chosen


def _difference(text: str, back: str) -> dict[str, str]:
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    begin, end = max(0, at - AROUND), at + AROUND
    return {"text": text[begin:end], "decoded": back[begin:end]}


def summed(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What :func:`examine` found over units, and with ``lossless`` whether every document came back."""
    total: dict[str, Any] = {**dict.fromkeys(COUNTS, 0), "first": None}
    for part in parts:
        for name in COUNTS:
            total[name] += part[name]
        total["first"] = total["first"] or part["first"]
    return {"lossless": not (total["other_bytes"] or total["changed"]), **total}


def in_words(manifest: Mapping[str, Any]) -> str | None:
    """One line about what a tokenizer does not give back, None if it gives back everything."""
    found, splits = manifest["round_trip"], manifest["splits"].values()
    if found["lossless"]:
        return None
    bytes_share = sum(s["token_bytes"] for s in splits) / max(1, sum(s["bytes"] for s in splits))
    lost = found["lost"] / max(1, found["characters"])
    first = found["first"] and f"; first: {found['first']['text']!r} became {found['first']['decoded']!r}"
    return (
        f"{manifest['tokenizer']['file']} does not give every text back: {found['changed']:,} of {found['decoded']:,} documents "
        f"that were decoded changed and lost {100 * lost:.3g} % of their characters; the tokens of {found['other_bytes']:,} of all "
        f"{found['documents']:,} documents have other bytes than the text, {100 * bytes_share:.2f} % of them in all"
        f"{first or ''}; bits per byte will be marked as approximate"
    )
