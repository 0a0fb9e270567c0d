"""Settings that decide which documents a prepared folder holds.

Options without influence on the documents, such as the number of workers, are not here.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.data_prep.decompression import MAX_UNPACK_RATIO
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.files import sha256_of

ON_ERROR = ("stop", "skip")
MAX_CHARS = 5_000_000  # per document; bounds the memory of a worker


@dataclass(frozen=True)
class Settings:
    """How text becomes documents, and which of them are kept.

    Attributes:
        field: JSON key, or column of a table, that holds the text; ``a.b`` is the key b of the
            object a.
        min_chars, max_chars: Drop documents with fewer or more characters after cleaning;
            ``max_chars`` 0: unlimited.
        exact_dedup: Drop documents whose text occurred before.
        near_dedup: Drop documents whose estimated Jaccard similarity to a kept one is at least
            this; None: off.
        decontaminate: Files whose 13-grams of words must not occur in training text.
        hit_ratio: Drop documents if at least this fraction of their 13-grams occurs there.
        language: Keep only documents in this language (ISO 639-1); None: all.
        language_probability: Minimum probability that the detector must assign to it.
        on_error: ``stop`` at a bad line, or ``skip`` and count it.
        unit_mb: Megabytes of text per unit, which becomes one shard per split; a worker holds a
            unit in memory, and a kill loses it.
        document_separator: Text between the documents of a .txt file; None: the file is one
            document.
        max_unpack_ratio: Maximum size of an unpacked file, as a multiple of its compressed size;
            0: unlimited (:mod:`~bitlm_dist.data_prep.decompression`).
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
    max_unpack_ratio: int = MAX_UNPACK_RATIO

    def check(self) -> None:
        """Check all values.

        Raises:
            UserError: A value is out of range; the message names the option.
        """
        if self.on_error not in ON_ERROR:
            raise UserError(f"--on-error {self.on_error}: choose from {', '.join(ON_ERROR)}")

        if not 1 <= self.unit_mb <= 1000:
            raise UserError(f"--unit-mb {self.unit_mb}: expected 1 to 1000")

        if self.min_chars < 0 or self.max_chars < 0:
            raise UserError(
                f"--min-chars {self.min_chars} --max-chars {self.max_chars}: expected 0 or more"
            )
        if self.max_chars and self.min_chars > self.max_chars:
            raise UserError(
                f"--min-chars {self.min_chars} is above --max-chars {self.max_chars}: "
                "no document would stay"
            )

        if self.near_dedup is not None and not 0.4 <= self.near_dedup <= 1:
            raise UserError(
                f"--near-dedup {self.near_dedup}: expected a similarity from 0.4 to 1, e.g. 0.8"
            )

        # A lone surrogate from the command line has no bytes.
        if self.document_separator is not None and not self.document_separator.encode(
            errors="ignore"
        ):
            raise UserError(
                "--document-separator is empty: give the text between two documents, "
                r"e.g. '\n\n\n' or '<|endoftext|>'"
            )

        if self.max_unpack_ratio < 0:
            raise UserError(
                f"--max-unpack-ratio {self.max_unpack_ratio}: expected 1 or more, or 0 for no bound"
            )

        for option, value in (
            ("--hit-ratio", self.hit_ratio),
            ("--language-probability", self.language_probability),
        ):
            if not 0 < value <= 1:
                raise UserError(f"{option} {value}: expected a share above 0, up to 1")

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values that identify the documents of a folder.

        Files are named by name and content, not by path, so that equal preparations in different
        folders have equal settings.

        Raises:
            UserError: A file of ``decontaminate`` cannot be read.
        """
        values = asdict(self)
        # A bound that can only end a preparation does not change the documents.
        del values["max_unpack_ratio"]
        # Folders that were prepared before this setting existed must stay valid.
        if self.document_separator is None:
            del values["document_separator"]

        values["decontaminate"] = [f"{file.name} {_hash_of(file)}" for file in self.decontaminate]
        return values


def _hash_of(file: Path) -> str:
    try:
        return sha256_of(file)[:16]
    except OSError as error:
        raise UserError(f"--decontaminate {os_error_message(error)}") from None
