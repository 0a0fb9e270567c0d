"""UTF-8 bytes per token, such that the tokens of a document add up to its text.

A token counts the bytes that the decoder produces for it between other tokens: decoded alone,
"▁the" loses its space and the byte token <0xE2> becomes a replacement character.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from bitlm_dist.strict_json import to_json

NEIGHBOR = "a"  # a token that every decoder leaves unchanged
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# How a byte-level vocabulary spells the 256 bytes.
BYTE_CHARACTERS = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())
# Decoders that treat a document's first token like any other.
POSITION_INDEPENDENT_DECODERS = {"ByteLevel", "ByteFallback", "Replace", "Fuse"}


@dataclass(frozen=True)
class ByteLengths:
    """UTF-8 bytes by token id; zero for special tokens.

    Attributes:
        inside: Bytes of a token that follows another, int64 [V].
        first: Bytes of the first token of a document, int64 [V]. Smaller where encoding prepends a
            space to the text, which the decoder drops again.
    """

    inside: NDArray[np.int64]
    first: NDArray[np.int64]

    def of_documents(self, documents: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.int64]:
        """Sum the bytes of each of N non-empty documents, int64 [N]."""
        if not documents:
            return np.zeros(0, dtype=np.int64)

        # reduceat sums each document's slice of the concatenation.
        starts = np.cumsum([0, *map(len, documents[:-1])])
        ids = np.concatenate(documents)
        opening = ids[starts]
        return (
            np.add.reduceat(self.inside[ids], starts) + self.first[opening] - self.inside[opening]
        )


def byte_lengths_from_decoder(
    tokens: Sequence[str | None], decoder: Any
) -> tuple[list[int], list[int]]:
    """Measure the bytes of each token by decoding it between others.

    Args:
        tokens: Tokens as the vocabulary spells them; None: a token without text.
        decoder: Decoder of the tokenizers library; None joins tokens with spaces, as the library
            does.

    Returns:
        Bytes of each token inside a document, and at its beginning.
    """
    steps = _flatten_decoder(decoder)
    step_types = [step["type"] for step in steps]
    is_position_independent = decoder is not None and POSITION_INDEPENDENT_DECODERS.issuperset(
        step_types
    )

    inside = [0] * len(tokens)
    first = [0] * len(tokens)
    count_bytes = _make_byte_counter(decoder, steps)
    for i, token in enumerate(tokens):
        if token is None:
            continue

        # A single byte of a longer character decodes to a replacement character.
        if "ByteFallback" in step_types and BYTE_TOKEN.fullmatch(token):
            inside[i] = first[i] = 1
            continue

        inside[i] = count_bytes(token, False)
        first[i] = inside[i] if is_position_independent else count_bytes(token, True)
    return inside, first


def _flatten_decoder(decoder: Any) -> list[dict[str, Any]]:
    """Flatten nested decoders into a list of their steps."""

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        """Steps of one decoder."""
        return (
            [part for inner in step["decoders"] for part in flat(inner)]
            if step["type"] == "Sequence"
            else [step]
        )

    return [] if decoder is None else flat(json.loads(decoder.__getstate__()))


def _make_byte_counter(decoder: Any, steps: Sequence[dict[str, Any]]) -> Callable[[str, bool], int]:
    """Make a function from a token, and whether it is a document's first, to its bytes."""
    byte_level_index = next(
        (i for i, step in enumerate(steps) if step["type"] == "ByteLevel"), None
    )
    if byte_level_index == 0:
        return lambda token, is_first: _spelled_bytes(token)

    size: Callable[[str], int] = lambda text: len(text.encode())  # noqa: E731
    # The steps before ByteLevel map one spelling to another; its output may be an incomplete
    # character, so bytes are counted on the spelling instead.
    if byte_level_index is not None:
        decoder = tokenizers.decoders.Sequence([])
        decoder.__setstate__(
            to_json({"type": "Sequence", "decoders": list(steps[:byte_level_index])}).encode()
        )
        size = _spelled_bytes

    decode: Callable[[list[str]], str] = " ".join if decoder is None else decoder.decode
    alone = size(decode([NEIGHBOR]))
    pair = size(decode([NEIGHBOR, NEIGHBOR]))

    def bytes_of(token: str, is_first: bool) -> int:
        """Bytes that a token adds to those of its neighbors."""
        found = (
            size(decode([token, NEIGHBOR])) - (pair - alone)
            if is_first
            else size(decode([NEIGHBOR, token, NEIGHBOR])) - pair
        )
        return max(0, found)

    return bytes_of


def _spelled_bytes(token: str) -> int:
    """Count the bytes that a byte-level token spells, one per character.

    A token with any other character, e.g. an added one, represents itself.
    """
    return len(token) if BYTE_CHARACTERS.issuperset(token) else len(token.encode())
