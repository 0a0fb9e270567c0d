"""From a chunk of a file to clean documents that may stay: what workers do first. Duplicates are found later, in corpus order."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from bitlm_dist.data_prep.cleaning import clean
from bitlm_dist.data_prep.clock import Clock
from bitlm_dist.data_prep.fields import BadLineError, Field, decode
from bitlm_dist.data_prep.filters import Decontamination, LanguageFilter
from bitlm_dist.data_prep.near_duplicates import Signatures
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import Chunk, too_long
from numpy.typing import NDArray

# Why a document is not in the folder, in the order in which it is asked.
BAD = ("not_utf8", "not_json", "no_text")
REASONS = (*BAD, "empty", "too_short", "too_long", "other_language", "contaminated", "duplicate", "near_duplicate", "no_tokens")
CHANGES = ("line_ends", "control_characters", "normalized")


@dataclass
class Batch:
    """The documents of one chunk that may stay.

    Attributes:
        source: number of the argument they come from.
        texts: clean, UTF-8.
        hashes: SHA-256 of each text.
        signatures: [documents, 128] for near deduplication, else None.
        counts: ``read`` documents, REASONS for which some were dropped, and CHANGES that cleaning made.
        error: the message for the first bad line where these stop everything.
        position: of the chunk.
        seconds: CPU seconds by stage.
    """

    source: int
    texts: list[bytes]
    hashes: list[bytes]
    signatures: NDArray[np.uint32] | None
    counts: Counter[str]
    error: str | None
    position: int
    seconds: dict[str, float] = field(default_factory=dict)


class Reader:
    """Reads chunks under fixed settings.

    Raises:
        UserError: a package is missing, or a file of evaluation text cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._field = Field(settings.field)
        self._language = LanguageFilter(settings.language, settings.language_probability) if settings.language else None
        self._decontamination = Decontamination(settings.decontaminate, settings.hit_ratio) if settings.decontaminate else None
        self._signatures = Signatures() if settings.near_dedup is not None else None

    def read(self, chunk: Chunk) -> Batch:
        """Parse, clean, filter and hash the documents of a chunk."""
        counts, clock = Counter({"read": chunk.too_long, "too_long": chunk.too_long}), Clock()
        with clock("parse"):
            raw, error = self._parse(chunk, counts)
        with clock("clean"):
            pairs = self._clean(raw, counts)
        del raw
        for stage, keep in (
            ("filter", self._fits),
            ("language", self._language and self._in_language),
            ("decontaminate", self._decontamination and self._is_clean_of),
        ):
            if keep:
                with clock(stage):
                    pairs = [pair for pair in pairs if keep(pair[0], counts)]
        with clock("hash"):
            texts = [clean_text for _, clean_text in pairs]
            hashes = [hashlib.sha256(text).digest() for text in texts]
        signatures = None
        if self._signatures:
            with clock("minhash"):
                signatures = self._signatures.of([text for text, _ in pairs])
        return Batch(chunk.source, texts, hashes, signatures, counts, error, chunk.position, dict(clock.seconds))

    def _parse(self, chunk: Chunk, counts: Counter[str]) -> tuple[list[str], str | None]:
        """Texts as they are in the file; and the error where the first bad one stops everything."""
        texts: list[str] = []
        for index, piece in enumerate(_pieces(chunk)):
            if piece is not None and chunk.ends is None and (not piece or piece.isspace()):
                continue  # an empty line is no document
            counts["read"] += 1
            try:
                texts.append(self._field.text_of(piece or b"") if chunk.ends is None else self._whole(piece, chunk))
            except BadLineError as error:
                counts[error.reason] += 1
                if self._settings.on_error == "stop":
                    return texts, f"{chunk.place(index)} {error}"
        return texts, None

    def _whole(self, raw: bytes | None, chunk: Chunk) -> str:
        """A text that is no JSON. A whole file is not dropped for its length alone: it may be the whole corpus."""
        text, limit = decode(raw), self._settings.max_chars
        if chunk.holds_files and 0 < limit < len(text) and limit < len(clean(text, Counter())[0]):
            raise BadLineError("too_long", too_long(self._settings))
        return text

    def _clean(self, raw: list[str], counts: Counter[str]) -> list[tuple[str, bytes]]:
        pairs = []
        for text in raw:
            pair = clean(text, counts)
            if not pair[0] or pair[0].isspace():
                counts["empty"] += 1
            else:
                pairs.append(pair)
        return pairs

    def _fits(self, text: str, counts: Counter[str]) -> bool:
        if len(text) < self._settings.min_chars:
            counts["too_short"] += 1
            return False
        if 0 < self._settings.max_chars < len(text):
            counts["too_long"] += 1
            return False
        return True

    def _in_language(self, text: str, counts: Counter[str]) -> bool:
        assert self._language
        holds = self._language.holds(text)
        counts["other_language"] += not holds
        return holds

    def _is_clean_of(self, text: str, counts: Counter[str]) -> bool:
        assert self._decontamination
        holds = self._decontamination.holds(text)
        counts["contaminated"] += holds
        return not holds


def _pieces(chunk: Chunk) -> list[bytes | None]:
    """The lines or texts of a chunk; None for a row without text."""
    if chunk.ends is None:
        return list(chunk.data.split(b"\n"))
    pieces: list[bytes | None] = []
    begin = 0
    for end in chunk.ends:
        pieces.append(None if end < 0 else chunk.data[begin:end])
        begin = max(begin, end)
    return pieces
