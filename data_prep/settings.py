"""What decides which documents a prepared folder holds. Workers, progress and the like decide nothing and are not here."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.data_prep.unpacking import RATIO

from bitlm_dist.errors import UserError
from bitlm_dist.files import sha256_of

ON_ERROR = ("stop", "skip")
MAX_CHARS = 5_000_000  # of a document; bounds the memory of a worker


@dataclass(frozen=True)
class Settings:
    """How text becomes documents, and which of them stay.

    Attributes:
        field: the JSON key, or the column of a table, that holds the text; ``a.b`` for the key b of the object a.
        min_chars, max_chars: a document with fewer or more characters (after cleaning) is dropped; ``max_chars`` 0: no limit.
        exact_dedup: drop a document whose text was met before.
        near_dedup: drop a document whose estimated Jaccard similarity to one that stays is at least this; None: off.
        decontaminate: files whose 13-grams of words must not be found in training text.
        hit_ratio: drop a document if at least this share of its 13-grams is found there.
        language: keep documents in this language (ISO 639-1) only; None: all.
        language_probability: how sure the detector must be of it.
        on_error: ``stop`` at a bad line, or ``skip`` and count it.
        unit_mb: megabytes of text in a unit, which is a shard of each split and what a worker holds and a kill loses.
        document_separator: what stands between the documents of a .txt file; None: the file is one document.
        max_unpack_ratio: how many times its size a compressed file may unpack to; 0: any
            (:mod:`~bitlm_dist.data_prep.unpacking`).
    """

    field: str = "text"
    min_chars: int = 1
    max_chars: int = MAX_CHARS
    exact_dedup: bool = True
    near_dedup: float | None = None
    decontaminate: tuple[Path, ...] = ()
    hit_ratio: float = 0.1
    language: str | None = None
    language_probability: float = 0.5
    on_error: str = "stop"
    unit_mb: int = 2
    document_separator: str | None = None
    max_unpack_ratio: int = RATIO

    def check(self) -> None:
        """Raise a UserError that names the first option whose value is out of range."""
        if self.on_error not in ON_ERROR:
            raise UserError(f"--on-error {self.on_error}: choose from {', '.join(ON_ERROR)}")
        if not 1 <= self.unit_mb <= 1000:
            raise UserError(f"--unit-mb {self.unit_mb}: expected 1 to 1000")
        if self.min_chars < 0 or self.max_chars < 0:
            raise UserError(f"--min-chars {self.min_chars} --max-chars {self.max_chars}: expected 0 or more")
        if self.max_chars and self.min_chars > self.max_chars:
            raise UserError(f"--min-chars {self.min_chars} is above --max-chars {self.max_chars}: no document would stay")
        if self.near_dedup is not None and not 0.4 <= self.near_dedup <= 1:
            raise UserError(f"--near-dedup {self.near_dedup}: expected a similarity from 0.4 to 1, e.g. 0.8")
        if self.document_separator is not None and not self.document_separator.encode(errors="ignore"):
            raise UserError(r"--document-separator is empty: give the text between two documents, e.g. '\n\n\n' or '<|endoftext|>'")
        if self.max_unpack_ratio < 0:
            raise UserError(f"--max-unpack-ratio {self.max_unpack_ratio}: expected 1 or more, or 0 for no bound")
        for option, value in (("--hit-ratio", self.hit_ratio), ("--language-probability", self.language_probability)):
            if not 0 < value <= 1:
                raise UserError(f"{option} {value}: expected a share above 0, up to 1")

    def record(self) -> dict[str, Any]:
        """JSON values that name the settings without the place of a file: equal runs in other folders have equal ones.

        A bound that ends a preparation decides nothing that it writes and is not named; nor is a later setting that is not used, so
        that folders from before it go on.

        Raises:
            UserError: a file of ``decontaminate`` cannot be read.
        """
        values = asdict(self)
        del values["max_unpack_ratio"]
        if self.document_separator is None:
            del values["document_separator"]
        values["decontaminate"] = [f"{file.name} {_hash_of(file)}" for file in self.decontaminate]
        return values


def _hash_of(file: Path) -> str:
    try:
        return sha256_of(file)[:16]
    except OSError as error:
        raise UserError(f"--decontaminate {file} cannot be read: {error.strerror}") from None
