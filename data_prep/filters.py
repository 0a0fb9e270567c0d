"""What looks at one document and says whether it stays: its length, its language, and whether it holds evaluation text.

Decontamination compares 13-grams of :mod:`~bitlm_dist.data_prep.words`, lower case, as GPT-3's and most later reports do; a share
of hits instead of a single one keeps the document that quotes a common phrase. A word of the evaluation files is a number, other
words are 0; the hash of a 13-gram is a polynomial of 13 numbers, which numpy computes for a whole document at once.

The language is told by py3langid: pure Python and numpy, its model in the wheel, no download. It reads the first
``LANGUAGE_CHARS`` characters, so that a long document costs no more than a short one.
"""

import importlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bitlm_dist.data_prep import fields, json_values, unpacking, words
from bitlm_dist.data_prep.cleaning import clean
from bitlm_dist.data_prep.finding import kind_of
from numpy.typing import NDArray

from bitlm_dist.errors import UserError

GRAM = 13  # words
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it loses nothing modulo 2^64
LANGUAGE_CHARS = 2000


def polynomial(values: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """A hash modulo 2^64 of every ``length`` neighbours of ``values`` [n]: [max(0, n - length + 1)]."""
    count = max(0, len(values) - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(length):
        hashes *= np.uint64(MULTIPLIER)
        hashes += values[i : i + count]
    return hashes


class Decontamination:
    """The 13-grams of evaluation files; a file is .txt (one text), or .jsonl, .ndjson or .json (every string in it is a text).

    Evaluation texts are cleaned as training texts are, so that equal ones are equal.

    Raises:
        UserError: a file cannot be read, or none holds a text of 13 words.
    """

    def __init__(self, files: Sequence[Path], hit_ratio: float) -> None:
        self._hit_ratio = hit_ratio
        self._numbers: dict[str, int] = {}
        grams = []
        for file in files:
            for text in _texts_of(file):
                found = words.find(text)
                numbers = [self._numbers.setdefault(word, len(self._numbers) + 1) for word in found]
                grams.append(polynomial(_spread(np.array(numbers, dtype=np.uint64)), GRAM))
        self._grams = np.unique(np.concatenate(grams)) if grams else np.zeros(0, dtype=np.uint64)
        if not len(self._grams):
            raise UserError(f"--decontaminate {' '.join(map(str, files))}: no text there has {GRAM} words")

    def hit_ratio(self, text: str) -> float:
        """Share of a document's 13-grams that the evaluation files hold; 0 if it has fewer than 13 words."""
        found = words.find(text)
        if len(found) < GRAM:
            return 0.0
        numbers = np.fromiter((self._numbers.get(word, 0) for word in found), np.uint64, len(found))
        hashes = polynomial(_spread(numbers), GRAM)
        places = np.minimum(np.searchsorted(self._grams, hashes), len(self._grams) - 1)
        return float((self._grams[places] == hashes).mean())

    def holds(self, text: str) -> bool:
        """Whether a document is to be dropped."""
        return self.hit_ratio(text) >= self._hit_ratio


def _spread(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Small numbers to 64 bits (the finalizer of splitmix64), so that sums of multiples do not meet by accident."""
    mixed = numbers * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(29)


def _texts_of(file: Path) -> Iterator[str]:
    """The cleaned texts of an evaluation file."""
    try:
        with file.open("rb") as raw:
            pieces = unpacking.pieces(raw, str(file))
            if kind_of(file.name) in (".jsonl", ".ndjson", ".json"):
                values = json_values.values(pieces, f"--decontaminate {file}", None)
                texts: Iterator[str] = (text for value in values for text in _strings_in(fields.loads(value.decode())))
            else:
                texts = iter([b"".join(pieces).decode("utf-8-sig")])
            for text in texts:
                yield clean(text, Counter())[0]
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"--decontaminate {file} cannot be read as text (.txt, .jsonl or .json): {error}") from None


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(inner)


class LanguageFilter:
    """Tells whether a document is in one language.

    Raises:
        UserError: py3langid is missing, or does not know the language.
    """

    def __init__(self, language: str, probability: float) -> None:
        try:
            detector = importlib.import_module("py3langid.langid")
        except ImportError:
            raise UserError(f"--language {language} needs py3langid: pip install 'bitlm-dist[language]'") from None
        self._identifier = detector.LanguageIdentifier.from_model_file(detector.MODEL_FILE, norm_probs=True)
        known = sorted(self._identifier.labels)
        if language not in known:
            raise UserError(f"--language {language} is not known: choose from {' '.join(known)}")
        self._language, self._probability = language, probability

    def holds(self, text: str) -> bool:
        """Whether a document is in the language."""
        language, probability = self._identifier.classify(text[:LANGUAGE_CHARS])
        return bool(language == self._language and probability >= self._probability)
