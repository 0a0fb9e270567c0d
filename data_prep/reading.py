"""Parse, clean and filter the documents of a chunk: the first task of the workers.

Duplicates are found later, in corpus order.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.data_prep.cleaning import clean
from bitlm_dist.data_prep.fields import BadLineError, TextField, decode_utf8
from bitlm_dist.data_prep.filters import DecontaminationFilter, LanguageFilter
from bitlm_dist.data_prep.near_duplicates import MinHasher
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import Chunk, too_long_message
from bitlm_dist.data_prep.stage_timer import StageTimer

# Reasons to drop a document, in the order in which they are checked.
BAD_LINE_REASONS = ("not_utf8", "not_json", "no_text")
DROP_REASONS = (
    *BAD_LINE_REASONS,
    "empty",
    "too_short",
    "too_long",
    "other_language",
    "contaminated",
    "duplicate",
    "near_duplicate",
    "no_tokens",
)
CLEANING_CHANGES = ("line_ends", "control_characters", "normalized")


@dataclass
class DocumentBatch:
    """Documents of one chunk that pass all filters.

    Attributes:
        source_index: Index of the input argument they come from.
        texts: Cleaned texts, UTF-8.
        hashes: SHA-256 of each text.
        signatures: [documents, 128] for near deduplication, else None.
        counts: Number of ``read`` documents, of dropped ones by reason (DROP_REASONS), and of
            changes made by cleaning (CLEANING_CHANGES).
        error: Message for the first bad line, if bad lines stop the preparation.
        corpus_offset: Offset of the chunk's end in the corpus.
        seconds: CPU seconds by stage.
    """

    source_index: int
    texts: list[bytes]
    hashes: list[bytes]
    signatures: NDArray[np.uint32] | None
    counts: Counter[str]
    error: str | None
    corpus_offset: int
    seconds: dict[str, float] = field(default_factory=dict)


class ChunkReader:
    """Reads chunks under fixed settings.

    Raises:
        UserError: A package is missing, or a file of evaluation text cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._text_field = TextField(settings.field)
        self._language_filter = (
            LanguageFilter(settings.language, settings.language_probability)
            if settings.language
            else None
        )
        self._decontamination_filter = (
            DecontaminationFilter(settings.decontaminate, settings.hit_ratio)
            if settings.decontaminate
            else None
        )
        self._min_hasher = MinHasher() if settings.near_dedup is not None else None

    def read_chunk(self, chunk: Chunk) -> DocumentBatch:
        """Parse, clean, filter and hash the documents of a chunk."""
        # Documents that were skipped for their size have been read, too.
        counts = Counter({"read": chunk.num_too_long, "too_long": chunk.num_too_long})
        timer = StageTimer()

        with timer("parse"):
            raw, error = self._parse(chunk, counts)
        with timer("clean"):
            pairs = self._clean(raw, counts)
        # Frees memory before the filters run.
        del raw

        # In the order of DROP_REASONS: a document is counted under the first reason that applies.
        for stage, keep in (
            ("filter", self._has_allowed_length),
            ("language", self._language_filter and self._is_in_language),
            ("decontaminate", self._decontamination_filter and self._is_uncontaminated),
        ):
            if keep:
                with timer(stage):
                    pairs = [pair for pair in pairs if keep(pair[0], counts)]

        # The leading process finds exact copies by these hashes alone.
        with timer("hash"):
            texts = [clean_text for _, clean_text in pairs]
            hashes = [hashlib.sha256(text).digest() for text in texts]

        signatures = None
        if self._min_hasher:
            with timer("minhash"):
                signatures = self._min_hasher.signatures([text for text, _ in pairs])

        return DocumentBatch(
            chunk.source_index,
            texts,
            hashes,
            signatures,
            counts,
            error,
            chunk.corpus_offset,
            dict(timer.seconds),
        )

    def _parse(self, chunk: Chunk, counts: Counter[str]) -> tuple[list[str], str | None]:
        """Extract the texts of a chunk.

        Returns:
            The texts as they are in the file, and the message for the first bad one if it stops
            the preparation.
        """
        texts: list[str] = []
        for index, raw_document in enumerate(_raw_documents(chunk)):
            if (
                raw_document is not None
                and chunk.ends is None
                and (not raw_document or raw_document.isspace())
            ):
                # An empty line is not a document.
                continue

            counts["read"] += 1
            try:
                texts.append(
                    self._text_field.extract_text(raw_document or b"")
                    if chunk.ends is None
                    else self._decode_document(raw_document, chunk)
                )
            except BadLineError as error:
                counts[error.reason] += 1
                if self._settings.on_error == "stop":
                    return texts, f"{chunk.location(index)} {error}"
        return texts, None

    def _decode_document(self, raw: bytes | None, chunk: Chunk) -> str:
        """Decode a document that is not JSON.

        Raises:
            BadLineError: It is not UTF-8, or it is a whole file and too long. Such a file is not
                dropped silently: it may be the entire corpus.
        """
        text = decode_utf8(raw)
        limit = self._settings.max_chars
        # Cleaning may shorten a text, so the cleaned length decides; it is computed only if needed.
        if (
            chunk.is_file_per_document
            and 0 < limit < len(text)
            and limit < len(clean(text, Counter())[0])
        ):
            raise BadLineError("too_long", too_long_message(self._settings))
        return text

    def _clean(self, raw: list[str], counts: Counter[str]) -> list[tuple[str, bytes]]:
        """Clean texts and drop empty ones.

        Returns:
            (text, its UTF-8) pairs.
        """
        pairs = []
        for text in raw:
            pair = clean(text, counts)
            if not pair[0] or pair[0].isspace():
                counts["empty"] += 1
            else:
                pairs.append(pair)
        return pairs

    def _has_allowed_length(self, text: str, counts: Counter[str]) -> bool:
        if len(text) < self._settings.min_chars:
            counts["too_short"] += 1
            return False

        if 0 < self._settings.max_chars < len(text):
            counts["too_long"] += 1
            return False

        return True

    def _is_in_language(self, text: str, counts: Counter[str]) -> bool:
        assert self._language_filter
        is_in_language = self._language_filter.is_in_language(text)
        counts["other_language"] += not is_in_language
        return is_in_language

    def _is_uncontaminated(self, text: str, counts: Counter[str]) -> bool:
        assert self._decontamination_filter
        is_contaminated = self._decontamination_filter.is_contaminated(text)
        counts["contaminated"] += is_contaminated
        return not is_contaminated


def _raw_documents(chunk: Chunk) -> list[bytes | None]:
    """Split a chunk into its lines or texts; None for a row without text."""
    if chunk.ends is None:
        return list(chunk.data.split(b"\n"))

    documents: list[bytes | None] = []
    begin = 0
    for end in chunk.ends:
        documents.append(None if end < 0 else chunk.data[begin:end])
        # The end of a row without text is -1.
        begin = max(begin, end)
    return documents
