"""UTF-8 bytes that each token stands for, so that the tokens of a document add up to its text.

A token means what the decoder makes of it between other tokens: decoded alone, "▁the" loses its blank and the byte token <0xE2>
becomes a replacement character.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from bitlm_dist.files import to_json

NEIGHBOR = "a"  # any token that every decoder leaves as it is
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
BYTE_CHARACTERS = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # how a byte-level vocabulary spells the 256 bytes
ALIKE_ANYWHERE = {"ByteLevel", "ByteFallback", "Replace", "Fuse"}  # decoders that treat a document's first token like any other


@dataclass(frozen=True)
class ByteLengths:
    """UTF-8 bytes by token id; special tokens have none.

    Attributes:
        inside: of a token that follows another, int64 [V].
        first: of the first token of a document, int64 [V]. It is less where encoding puts a blank before the text, which the
            decoder drops again.
    """

    inside: NDArray[np.int64]
    first: NDArray[np.int64]

    def of_documents(self, documents: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.int64]:
        """Bytes of each of N documents, none of which is empty: int64 [N]."""
        if not documents:
            return np.zeros(0, dtype=np.int64)
        starts = np.cumsum([0, *map(len, documents[:-1])])
        ids = np.concatenate(documents)
        opening = ids[starts]
        return np.add.reduceat(self.inside[ids], starts) + self.first[opening] - self.inside[opening]


def by_decoder(tokens: Sequence[str | None], decoder: Any) -> tuple[list[int], list[int]]:
    """Bytes of each token inside a document and at its beginning.

    Args:
        tokens: as the vocabulary spells them; None: stands for no text.
        decoder: of the tokenizers library; None joins tokens with blanks, as the library does.
    """
    steps = _steps(decoder)
    kinds = [step["type"] for step in steps]
    alike = decoder is not None and ALIKE_ANYWHERE.issuperset(kinds)
    inside, first = [0] * len(tokens), [0] * len(tokens)
    measure = _measure(decoder, steps)
    for i, token in enumerate(tokens):
        if token is None:
            continue
        if "ByteFallback" in kinds and BYTE_TOKEN.fullmatch(token):
            inside[i] = first[i] = 1
            continue
        inside[i] = measure(token, False)
        first[i] = inside[i] if alike else measure(token, True)
    return inside, first


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """The decoder as a flat list of its parts."""

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [part for inner in step["decoders"] for part in flat(inner)] if step["type"] == "Sequence" else [step]

    return [] if decoder is None else flat(json.loads(decoder.__getstate__()))


def _measure(decoder: Any, steps: Sequence[dict[str, Any]]) -> Callable[[str, bool], int]:
    """A function of a token, and of whether it is a document's first, that gives its bytes."""
    at = next((i for i, step in enumerate(steps) if step["type"] == "ByteLevel"), None)
    if at == 0:
        return lambda token, is_first: _spelled_bytes(token)
    size: Callable[[str], int] = lambda text: len(text.encode())  # noqa: E731
    if at is not None:  # what comes before turns one spelling into another; the parts of a character that follow are no text yet
        decoder = tokenizers.decoders.Sequence([])
        decoder.__setstate__(to_json({"type": "Sequence", "decoders": list(steps[:at])}).encode())
        size = _spelled_bytes
    decode: Callable[[list[str]], str] = " ".join if decoder is None else decoder.decode
    alone, pair = size(decode([NEIGHBOR])), size(decode([NEIGHBOR, NEIGHBOR]))

    def bytes_of(token: str, is_first: bool) -> int:
        found = size(decode([token, NEIGHBOR])) - (pair - alone) if is_first else size(decode([NEIGHBOR, token, NEIGHBOR])) - pair
        return max(0, found)

    return bytes_of


def _spelled_bytes(token: str) -> int:
    """A byte-level vocabulary spells every byte with one character; a token with any other character stands for itself."""
    return len(token) if BYTE_CHARACTERS.issuperset(token) else len(token.encode())
