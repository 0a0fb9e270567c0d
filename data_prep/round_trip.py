"""Check that tokens reproduce the text they were made from.

The bytes of every document's tokens are added up, and one document in a hundred is decoded in
full. Bits per byte refer to the text only if the tokenizer is lossless.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.formatting import format_percent, plural

DECODE_ONE_IN = 100  # documents
MIN_DECODED = 20  # documents of the corpus, if it has as many
CONTEXT_CHARACTERS = 20  # shown on either side of a difference
COUNT_NAMES = ("documents", "other_bytes", "decoded", "changed", "characters", "lost")


def check_round_trip(
    texts: Sequence[bytes],
    hashes: Sequence[bytes],
    encoded: Sequence[NDArray[np.integer[Any]]],
    token_bytes: NDArray[np.int64],
    tokenizer: Tokenizer,
    num_documents_before: int,
) -> dict[str, Any]:
    """Compare the N documents of a unit with the text of their tokens.

    Args:
        texts: N texts, UTF-8.
        hashes: SHA-256 of each text; decides which documents are decoded.
        encoded: Token ids of each document; none may be empty.
        token_bytes: Bytes of each document's tokens, int64 [N].
        tokenizer: The tokenizer that encoded them.
        num_documents_before: Number of documents in all earlier units.

    Returns:
        Counts by the names in ``COUNT_NAMES``: ``documents``, ``other_bytes`` (documents whose
        tokens differ in bytes from the text), ``decoded`` documents, ``changed`` ones among these,
        ``characters`` of the decoded documents, and ``lost`` characters. ``first`` is the text
        around the first mismatch, or None.
    """
    result: dict[str, Any] = dict.fromkeys(COUNT_NAMES, 0)
    differs = token_bytes != np.fromiter(map(len, texts), np.int64, len(texts))
    result.update(documents=len(texts), other_bytes=int(differs.sum()), first=None)

    # The first document with other bytes is decoded, too, to show where it differs.
    to_decode = _choose_documents_to_decode(hashes, num_documents_before)
    for i in sorted({*to_decode, *differs.nonzero()[0][:1].tolist()}):
        text = texts[i].decode()
        decoded = tokenizer.decode(encoded[i].tolist())
        if i in to_decode:
            result["decoded"] += 1
            result["characters"] += len(text)

        if text != decoded and i in to_decode:
            result["changed"] += 1
            # As multisets: characters that only moved are not lost.
            result["lost"] += (Counter(text) - Counter(decoded)).total()

        if result["first"] is None and (text != decoded or differs[i]):
            result["first"] = _first_difference(text, decoded)
    return result


def _choose_documents_to_decode(hashes: Sequence[bytes], num_documents_before: int) -> set[int]:
    """Choose the documents of a unit that are decoded in full.

    Args:
        hashes: SHA-256 of each document.
        num_documents_before: Number of documents in all earlier units.

    Returns:
        Indices of the chosen documents.
    """
    if not hashes:
        return set()

    # Not the first 8 bytes: these choose the documents to hold out.
    hash_values = np.frombuffer(b"".join(hashes), "<u4").reshape(len(hashes), -1)[:, 2]
    chosen = set((hash_values % DECODE_ONE_IN == 0).nonzero()[0].tolist())

    # The first units add documents with the smallest hashes, so that MIN_DECODED are reached.
    return (
        chosen
        | set(np.argsort(hash_values, kind="stable")[: MIN_DECODED - num_documents_before].tolist())
        if num_documents_before < MIN_DECODED
        else chosen
    )


def _first_difference(text: str, decoded: str) -> dict[str, str]:
    """Cut out the surroundings of the first difference."""
    position = next(
        (i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b),
        min(len(text), len(decoded)),
    )
    begin = max(0, position - CONTEXT_CHARACTERS)
    end = position + CONTEXT_CHARACTERS
    return {"text": text[begin:end], "decoded": decoded[begin:end]}


def sum_results(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the results of :func:`check_round_trip` over units.

    Returns:
        The totals, and ``lossless``: True if no mismatch was found.
    """
    total: dict[str, Any] = {**dict.fromkeys(COUNT_NAMES, 0), "first": None}
    for result in results:
        for name in COUNT_NAMES:
            total[name] += result[name]
        total["first"] = total["first"] or result["first"]

    return {"lossless": not (total["other_bytes"] or total["changed"]), **total}


def lossy_warning(manifest: Mapping[str, Any]) -> str | None:
    """Describe in one line the text that a tokenizer loses; None if it is lossless."""
    result = manifest["round_trip"]
    splits = manifest["splits"].values()
    if result["lossless"]:
        return None

    bytes_ratio = sum(s["token_bytes"] for s in splits) / max(1, sum(s["bytes"] for s in splits))
    lost_fraction = result["lost"] / max(1, result["characters"])
    first = (
        result["first"]
        and f"; first: {result['first']['text']!r} became {result['first']['decoded']!r}"
    )
    return (
        f"{manifest['tokenizer']['file']} does not give every text back: "
        f"{result['changed']:,} of {plural(result['decoded'], 'decoded document')} changed "
        f"and lost {format_percent(lost_fraction)} of their characters; "
        f"the tokens of {result['other_bytes']:,} of {plural(result['documents'], 'document')} "
        f"differ in bytes from the text, with {100 * bytes_ratio:.2f} % of its bytes overall"
        f"{first or ''}; bits per byte will be marked as approximate"
    )
