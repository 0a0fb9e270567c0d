"""Filters on single documents: decontamination against evaluation texts, and language.

Decontamination compares 13-grams of lower-case :mod:`~bitlm_dist.data_prep.words`, as GPT-3 and
most later reports do. It requires a minimum ratio of hits instead of a single one, which keeps
documents that quote a common phrase. Each word of the evaluation files has a number; all other
words are 0. The hash of a 13-gram is a polynomial in 13 numbers, which numpy computes for a whole
document at once.

Languages are identified by py3langid: pure Python and numpy, with the model in the wheel, no
download. It reads the first ``LANGUAGE_CHARS`` characters, so that long documents cost no more than
short ones.
"""

import importlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.data_prep import decompression, fields, json_values, words
from bitlm_dist.data_prep.cleaning import clean
from bitlm_dist.data_prep.input_files import file_format_of
from bitlm_dist.errors import UserError

NGRAM_SIZE = 13  # in words
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplication modulo 2^64 is invertible
LANGUAGE_CHARS = 2000


def ngram_hashes(values: NDArray[np.uint64], ngram_size: int) -> NDArray[np.uint64]:
    """Hash every n-gram of a sequence, modulo 2^64.

    Args:
        values: sequence of hashed words, [n].
        ngram_size: words per n-gram.

    Returns:
        Hashes, [max(0, n - ngram_size + 1)].
    """
    num_ngrams = max(0, len(values) - ngram_size + 1)
    hashes = np.zeros(num_ngrams, dtype=np.uint64)

    # Horner's rule, for all n-grams at once.
    for i in range(ngram_size):
        hashes *= np.uint64(MULTIPLIER)
        hashes += values[i : i + num_ngrams]
    return hashes


class DecontaminationFilter:
    """Detects documents that contain evaluation texts, by their 13-grams.

    Evaluation texts are cleaned in the same way as training texts, so that equal texts match.

    Args:
        files: evaluation files. A .txt file is one text; in a .jsonl, .ndjson or .json file, every
            string is a text.
        min_hit_ratio: see :meth:`is_contaminated`.

    Raises:
        UserError: A file cannot be read, or none holds a text of 13 words.
    """

    def __init__(self, files: Sequence[Path], min_hit_ratio: float) -> None:
        self._min_hit_ratio = min_hit_ratio
        self._word_ids: dict[str, int] = {}

        # Word ids start at 1; 0 stands for words that no evaluation file has.
        ngrams = []
        for file in files:
            for text in _evaluation_texts(file):
                text_words = words.find_words(text)
                word_ids = [
                    self._word_ids.setdefault(word, len(self._word_ids) + 1) for word in text_words
                ]
                ngrams.append(
                    ngram_hashes(_mix_bits(np.array(word_ids, dtype=np.uint64)), NGRAM_SIZE)
                )

        # Sorted, for a binary search.
        self._evaluation_ngrams = (
            np.unique(np.concatenate(ngrams)) if ngrams else np.zeros(0, dtype=np.uint64)
        )
        if not len(self._evaluation_ngrams):
            raise UserError(
                f"--decontaminate {' '.join(map(str, files))}: no text there has {NGRAM_SIZE} words"
            )

    def hit_ratio(self, text: str) -> float:
        """Compute the fraction of a document's 13-grams that occur in the evaluation files.

        A document of fewer than 13 words has a ratio of 0.
        """
        text_words = words.find_words(text)
        if len(text_words) < NGRAM_SIZE:
            return 0.0

        word_ids = np.fromiter(
            (self._word_ids.get(word, 0) for word in text_words), np.uint64, len(text_words)
        )
        hashes = ngram_hashes(_mix_bits(word_ids), NGRAM_SIZE)

        positions = np.minimum(
            np.searchsorted(self._evaluation_ngrams, hashes), len(self._evaluation_ngrams) - 1
        )
        return float((self._evaluation_ngrams[positions] == hashes).mean())

    def is_contaminated(self, text: str) -> bool:
        """Return True if the hit ratio of a document is at least ``min_hit_ratio``."""
        return self.hit_ratio(text) >= self._min_hit_ratio


def _mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread small integers over 64 bits, so that polynomials in them do not collide by accident.

    The multipliers are those of the finalizer of splitmix64.
    """
    mixed = values * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(29)


def _evaluation_texts(file: Path) -> Iterator[str]:
    """Yield the cleaned texts of an evaluation file."""
    try:
        with file.open("rb") as raw:
            blocks = decompression.decompressed_blocks(raw, str(file))
            if file_format_of(file.name) in (".jsonl", ".ndjson", ".json"):
                values = json_values.iter_values(blocks, f"--decontaminate {file}", None)
                texts: Iterator[str] = (
                    text
                    for value in values
                    for text in _strings_in(fields.loads_ignoring_integers(value.decode()))
                )
            else:
                texts = iter([b"".join(blocks).decode("utf-8-sig")])

            for text in texts:
                yield clean(text, Counter())[0]
    except UserError:
        # Names the file and the problem already; the other errors of a damaged file do not.
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"--decontaminate {file} cannot be read as text (.txt, .jsonl or .json): {error}"
        ) from None


def _strings_in(value: Any) -> Iterator[str]:
    """Yield all strings of a JSON value, without the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(inner)


class LanguageFilter:
    """Selects documents of one language.

    Args:
        language: language code that py3langid knows, e.g. ``en``.
        min_probability: minimum probability of that language.

    Raises:
        UserError: py3langid is missing, or does not know the language.
    """

    def __init__(self, language: str, min_probability: float) -> None:
        try:
            detector = importlib.import_module("py3langid.langid")
        except ImportError:
            raise UserError(
                f"--language {language} needs py3langid: pip install 'bitlm-dist[language]'"
            ) from None

        # Normalized probabilities, or min_probability would compare with log-likelihoods.
        self._identifier = detector.LanguageIdentifier.from_model_file(
            detector.MODEL_FILE, norm_probs=True
        )

        supported = sorted(self._identifier.labels)
        if language not in supported:
            raise UserError(
                f"--language {language} is not known: choose from {' '.join(supported)}"
            )

        self._language = language
        self._min_probability = min_probability

    def is_in_language(self, text: str) -> bool:
        """Return True if a document is in the language with at least ``min_probability``."""
        language, probability = self._identifier.classify(text[:LANGUAGE_CHARS])
        return bool(language == self._language and probability >= self._min_probability)
