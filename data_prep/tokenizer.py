"""Tokenizers behind one small interface: files of Hugging Face, tiktoken, tekken and SentencePiece, or a BPE trained here.

A file may also be named as ``package:DISTRIBUTION:FILE``: one that an installed package ships. It is copied, the package is neither
imported nor needed later.

Every vocabulary has a BOS and an EOS id; a tokenizer without one gets it appended. Text is always encoded as plain text: the
spelling of a special token in a document stays text.
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
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.data_prep.tokenizer_backends import Backend, open_file
from numpy.typing import NDArray

from bitlm_dist.errors import UserError

TOKENIZER = "tokenizer"  # folder in a prepared folder and in a run folder
SMALLEST_BPE = 258  # 256 bytes, BOS, EOS
PACKAGE = "package:"
MODEL, CONFIG = "tokenizer.json", "tokenizer_config.json"  # of a Hugging Face folder
IN_FOLDERS = (MODEL, "tokenizer.model", "tekken.json", "*.tiktoken")  # what is looked for in a folder, in this order


class Tokenizer:
    """A tokenizer with BOS and EOS.

    Args:
        path: tokenizer.json, .tiktoken, tekken or SentencePiece .model file, or a folder that holds one. Of a Hugging Face folder,
            tokenizer_config.json says which tokens are BOS and EOS.

    Attributes:
        file: the file with the vocabulary.
        vocabulary: V, special tokens included.
        bos, eos: their ids.
        fingerprint: SHA-256 of the file and the special ids.
        not_applied: what the file asks for at encoding and does not get, in words.

    Raises:
        UserError: the file is missing, damaged, of another kind, or its library is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.file, config = _files_in(path) if path.is_dir() else (path, None)
        self._files = [self.file, *([config] if config else [])]
        named = _special_tokens(config) if config else {}
        self._backend = open_file(self.file, named.get("bos_token"), named.get("eos_token"))
        _check_named(config, named, self._backend)
        bos, eos, size = self._backend.bos, self._backend.eos, self._backend.size
        if bos == eos:  # e.g. GPT-2: a document's begin must not look like its end
            bos = None
        self.bos = size if bos is None else bos
        size += bos is None
        self.eos = size if eos is None else eos
        self.vocabulary = size + (eos is None)
        self.not_applied = self._backend.not_applied
        seen = f"{self.bos} {self.eos} {self.vocabulary} ".encode() + self.file.read_bytes()
        self.fingerprint = hashlib.sha256(seen).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Each text to its ids, without BOS and EOS."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, as those of a document from its beginning; BOS, EOS and ids beyond the vocabulary are left out."""
        special = {self.bos, self.eos}
        return self._backend.decode([i for i in ids if i not in special and i < self._backend.size])

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text that ``ids`` add to a document that begins with ``before``; decoded alone they may lack a blank at the beginning."""
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    @cached_property
    def byte_lengths(self) -> ByteLengths:
        """UTF-8 bytes that each id stands for."""
        inside, first = np.zeros((2, self.vocabulary), dtype=np.int64)
        for lengths, known in zip((inside, first), self._backend.byte_lengths(), strict=True):
            lengths[: len(known)] = known
            lengths[[self.bos, self.eos]] = 0
        return ByteLengths(inside, first)

    def folds_case(self) -> bool:
        """Whether it makes lower case of upper case, which no count of bytes shows."""
        (ids,) = self.encode_batch(["a A"])
        return self.decode(ids.tolist()) == "a a"

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files into ``folder``, where :meth:`of_folder` finds them."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self._files:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)

    @classmethod
    def of_folder(cls, folder: Path) -> "Tokenizer":
        """The tokenizer that :meth:`save` copied into ``folder``, and nothing else may lie there."""
        files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
        if {file.name for file in files} == {MODEL, CONFIG}:
            return cls(folder)
        if len(files) != 1:
            raise UserError(f"{folder} must hold one tokenizer, found {len(files)} files: prepare the data again")
        return cls(files[0])


def _files_in(folder: Path) -> tuple[Path, Path | None]:
    """The file with the vocabulary in a folder, and the one that names special tokens.

    Raises:
        UserError: there is none, or several that would do.
    """
    for pattern in IN_FOLDERS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise UserError(f"tokenizer {folder} holds {', '.join(file.name for file in found)}: name one of them")
        if found:
            config = folder / CONFIG
            return found[0], config if found[0].name == MODEL and config.is_file() else None
    raise UserError(f"tokenizer {folder} holds none of {', '.join(IN_FOLDERS)}: name the tokenizer's file")


def _special_tokens(config: Path) -> dict[str, str]:
    """The tokens that a tokenizer_config.json names, by its keys bos_token and eos_token."""
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
        named = {key: document.get(key) for key in ("bos_token", "eos_token")}
        texts = {key: token["content"] if isinstance(token, dict) else token for key, token in named.items() if token}
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{config} cannot be read ({error}): restore it, or name the folder's {MODEL}") from None
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{config}: {key} is {text!r}, expected a token: mend it, or name the folder's {MODEL}")
    return texts


def _check_named(config: Path | None, named: Mapping[str, str], backend: Backend) -> None:
    for key, id_ in (("bos_token", backend.bos), ("eos_token", backend.eos)):
        if key in named and id_ is None:
            raise UserError(f"{config}: {key} is {named[key]!r}, which {MODEL} does not have: mend one of them")


def find_tokenizer(name: str) -> Path:
    """The file that ``name`` stands for: a path, or ``package:DISTRIBUTION:FILE``.

    Raises:
        UserError: the package is not installed or ships no such file; the message lists what it ships.
    """
    if not name.startswith(PACKAGE):
        return Path(name)
    package, _, wanted = name.removeprefix(PACKAGE).partition(":")
    try:
        shipped = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"--tokenizer {name}: the package {package} is not installed: pip install {package}") from None
    found = [file for file in shipped if wanted in (file.name, str(file))]
    if len(found) == 1:
        return Path(str(found[0].locate()))
    similar = sorted(str(file) for file in (found or shipped) if _looks_like_tokenizer(file.name))
    if found:
        raise UserError(f"--tokenizer {name} fits several files, write the whole name: {', '.join(similar)}")
    raise UserError(f"--tokenizer {name}: {package} ships {', '.join(similar) or 'no file that looks like a tokenizer'}")


def _looks_like_tokenizer(name: str) -> bool:
    return name.endswith((".tiktoken", ".model")) or (
        name.endswith(".json") and any(sign in name for sign in ("tok", "tek", "vocab", "bpe"))
    )


def train_bpe(texts: Iterable[str], vocabulary: int, file: Path) -> None:
    """Train a byte-level BPE of ``vocabulary`` entries (BOS, EOS and the 256 bytes among them) and write tokenizer.json."""
    assert vocabulary >= SMALLEST_BPE
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    file.write_text(model.to_str(), encoding="utf-8")
