"""One small interface to tokenizers: Hugging Face, tiktoken, tekken, SentencePiece, or a new BPE.

A file may also be given as ``package:DISTRIBUTION:FILE``, i.e. a file shipped by an installed
package. It is copied; the package is neither imported nor needed later.

Every vocabulary has a BOS and an EOS id, which are appended if the tokenizer lacks them. Text is
always encoded as plain text: the spelling of a special token in a document remains text.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.data_prep.tokenizer_backends import Backend, open_tokenizer_file
from bitlm_dist.errors import UserError
from bitlm_dist.formatting import plural

TOKENIZER_DIR = "tokenizer"  # folder in a prepared folder and in a run folder
MIN_BPE_VOCAB_SIZE = 258  # 256 bytes, BOS, EOS
PACKAGE_PREFIX = "package:"
# Files of a Hugging Face folder.
MODEL_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# Files searched for in a folder, in this order.
TOKENIZER_FILE_PATTERNS = (MODEL_FILE, "tokenizer.model", "tekken.json", "*.tiktoken")


class Tokenizer:
    """A tokenizer with BOS and EOS.

    Args:
        path: A tokenizer.json, .tiktoken, tekken or SentencePiece .model file, or a folder that
            holds one. In a Hugging Face folder, tokenizer_config.json names BOS and EOS.

    Attributes:
        file: The file with the vocabulary.
        vocab_size: V, special tokens included.
        bos, eos: Ids of BOS and EOS.
        fingerprint: SHA-256 of the file and the special ids.
        not_applied: Descriptions of the encoding settings in the file that are not applied.

    Raises:
        UserError: The file is missing, damaged or of another kind, or its library is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.file, config = _files_in(path) if path.is_dir() else (path, None)
        self._files = [self.file, *([config] if config else [])]
        special_tokens = _special_tokens(config) if config else {}
        self._backend = open_tokenizer_file(
            self.file, special_tokens.get("bos_token"), special_tokens.get("eos_token")
        )
        _check_special_tokens(config, special_tokens, self._backend)

        bos = self._backend.bos
        eos = self._backend.eos
        size = self._backend.vocab_size
        # E.g. in GPT-2; the beginning of a document must not look like its end.
        if bos == eos:
            bos = None

        # Missing special tokens get the ids after the vocabulary.
        self.bos = size if bos is None else bos
        size += bos is None
        self.eos = size if eos is None else eos
        self.vocab_size = size + (eos is None)

        self.not_applied = self._backend.not_applied
        # The ids are included because they may come from tokenizer_config.json.
        identity = f"{self.bos} {self.eos} {self.vocab_size} ".encode() + self.file.read_bytes()
        self.fingerprint = hashlib.sha256(identity).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode each text to its ids, without BOS and EOS."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the ids of a document from its beginning.

        BOS, EOS and ids beyond the backend's vocabulary are skipped.
        """
        special = {self.bos, self.eos}
        return self._backend.decode(
            [i for i in ids if i not in special and i < self._backend.vocab_size]
        )

    def decode_after(self, prefix: Sequence[int], ids: Sequence[int]) -> str:
        """Decode ``ids`` as the continuation of ``prefix``.

        Decoded alone they may lack the space at their beginning.
        """
        return self.decode([*prefix, *ids])[len(self.decode(prefix)) :]

    @cached_property
    def byte_lengths(self) -> ByteLengths:
        """UTF-8 bytes by token id."""
        inside, first = np.zeros((2, self.vocab_size), dtype=np.int64)
        for lengths, known_lengths in zip(
            (inside, first), self._backend.byte_lengths(), strict=True
        ):
            lengths[: len(known_lengths)] = known_lengths
            lengths[[self.bos, self.eos]] = 0

        return ByteLengths(inside, first)

    def folds_case(self) -> bool:
        """True if encoding folds upper case, which the number of bytes does not show."""
        (ids,) = self.encode_batch(["a A"])
        return self.decode(ids.tolist()) == "a a"

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files into ``folder``, where :meth:`from_folder` finds them."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self._files:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Open the tokenizer that :meth:`save` copied; ``folder`` must hold nothing else.

        Raises:
            UserError: The folder holds no tokenizer, or other files, too.
        """
        files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
        if {file.name for file in files} == {MODEL_FILE, CONFIG_FILE}:
            return cls(folder)

        if len(files) != 1:
            raise UserError(
                f"{folder} must hold one tokenizer, found {plural(len(files), 'file')}: "
                "prepare the data again"
            )

        return cls(files[0])


def _files_in(folder: Path) -> tuple[Path, Path | None]:
    """Find the tokenizer in a folder.

    Returns:
        The file with the vocabulary, and the one that names special tokens, if any.

    Raises:
        UserError: There is no such file, or more than one.
    """
    for pattern in TOKENIZER_FILE_PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise UserError(
                f"tokenizer {folder} holds {', '.join(file.name for file in found)}: "
                "name one of them"
            )

        if found:
            config = folder / CONFIG_FILE
            return found[0], config if found[0].name == MODEL_FILE and config.is_file() else None

    raise UserError(
        f"tokenizer {folder} holds none of {', '.join(TOKENIZER_FILE_PATTERNS)}: "
        "name the tokenizer's file"
    )


def _special_tokens(config: Path) -> dict[str, str]:
    """Read BOS and EOS from a tokenizer_config.json, by its keys bos_token and eos_token."""
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
        # A token is a string or, for an AddedToken, an object with its content.
        named = {key: document.get(key) for key in ("bos_token", "eos_token")}
        texts = {
            key: token["content"] if isinstance(token, dict) else token
            for key, token in named.items()
            if token
        }
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{config} cannot be read ({error}): restore it, or name the folder's {MODEL_FILE}"
        ) from None

    for key, text in texts.items():
        if not isinstance(text, str):
            raise UserError(
                f"{config}: {key} is {text!r}, expected a token: "
                f"mend it, or name the folder's {MODEL_FILE}"
            )
    return texts


def _check_special_tokens(
    config: Path | None, special_tokens: Mapping[str, str], backend: Backend
) -> None:
    """Raise a UserError if the vocabulary lacks a token that the config names."""
    for key, id_ in (("bos_token", backend.bos), ("eos_token", backend.eos)):
        if key in special_tokens and id_ is None:
            raise UserError(
                f"{config}: {key} is {special_tokens[key]!r}, which {MODEL_FILE} does not have: "
                "mend one of them"
            )


def find_tokenizer(name: str) -> Path:
    """Resolve ``name``, a path or ``package:DISTRIBUTION:FILE``, to a file.

    Raises:
        UserError: The package is not installed or ships no such file; the message lists the files
            it ships.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return Path(name)

    # The metadata lists the files; importing the package is not needed.
    package, _, file_name = name.removeprefix(PACKAGE_PREFIX).partition(":")
    try:
        shipped = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"--tokenizer {name}: the package {package} is not installed: pip install {package}"
        ) from None

    found = [file for file in shipped if file_name in (file.name, str(file))]
    if len(found) == 1:
        return Path(str(found[0].locate()))

    similar = sorted(str(file) for file in (found or shipped) if _looks_like_tokenizer(file.name))
    if found:
        raise UserError(
            f"--tokenizer {name} fits several files, write the whole name: {', '.join(similar)}"
        )
    raise UserError(
        f"--tokenizer {name}: {package} ships "
        f"{', '.join(similar) or 'no file that looks like a tokenizer'}"
    )


def _looks_like_tokenizer(name: str) -> bool:
    return name.endswith((".tiktoken", ".model")) or (
        name.endswith(".json") and any(sign in name for sign in ("tok", "tek", "vocab", "bpe"))
    )


def train_bpe(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    """Train a byte-level BPE and write it to a tokenizer.json.

    Args:
        texts: Training text.
        vocab_size: Number of entries, BOS, EOS and the 256 bytes included.
        file: Output file.
    """
    assert vocab_size >= MIN_BPE_VOCAB_SIZE
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()

    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    model.train_from_iterator(texts, trainer)
    file.write_text(model.to_str(), encoding="utf-8")
