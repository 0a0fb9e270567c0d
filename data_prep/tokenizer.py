"""Tokenizers behind one small interface: tokenizer.json (Hugging Face), .tiktoken and tekken files, or a BPE trained here.

A file may also be named as ``package:DISTRIBUTION:FILE``: one that an installed package ships. It is copied, the package is neither
imported nor needed later.

Every vocabulary has a BOS and an EOS id; a tokenizer without one gets it appended. Text is always encoded as plain text: the
spelling of a special token in a document stays text.
"""

import base64
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray

from bitlm_dist.errors import UserError

BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|begin▁of▁sentence|>", "[BOS]", "<|startoftext|>")
EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<|endoftext|>", "[EOS]")
TOKENIZER = "tokenizer"  # folder in a prepared folder and in a run folder
SMALLEST_BPE = 258  # 256 bytes, BOS, EOS
PACKAGE = "package:"
# tiktoken's encode_to_numpy looks for special tokens, and for none at all at every single character: half its speed
NO_SPECIAL = "<|\0 no special token \0|>"
# Splits text before merging; the pattern that GPT-4's vocabulary and its descendants were trained with, digits one by one.
TIKTOKEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Backend(Protocol):
    """What a tokenizer library must do; ids below ``size``."""

    size: int
    bos: int | None
    eos: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Texts to ids, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; broken UTF-8 becomes the replacement character."""
        ...

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes that each id stands for; 0 for special tokens."""
        ...


class Tokenizer:
    """A tokenizer with BOS and EOS.

    Attributes:
        vocabulary: V, special tokens included.
        bos, eos: their ids.
        fingerprint: SHA-256 of the file and the special ids.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._backend = _open(file)
        size = self._backend.size
        self.bos = size if self._backend.bos is None else self._backend.bos
        size += self._backend.bos is None
        self.eos = size if self._backend.eos is None else self._backend.eos
        self.vocabulary = size + (self._backend.eos is None)
        seen = f"{self.bos} {self.eos} {self.vocabulary} ".encode() + file.read_bytes()
        self.fingerprint = hashlib.sha256(seen).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Each text to its ids, without BOS and EOS."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; BOS, EOS and ids beyond the vocabulary are left out."""
        special = {self.bos, self.eos}
        return self._backend.decode([i for i in ids if i not in special and i < self._backend.size])

    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each id, [V]."""
        lengths = np.zeros(self.vocabulary, dtype=np.int64)
        known = self._backend.byte_lengths()
        lengths[: len(known)] = known
        lengths[[self.bos, self.eos]] = 0
        return lengths

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's file into ``folder``, where :meth:`of_folder` finds it."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / self.file.name).exists():
            shutil.copyfile(self.file, folder / self.file.name)

    @classmethod
    def of_folder(cls, folder: Path) -> "Tokenizer":
        """The one tokenizer file in ``folder``."""
        files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
        if len(files) != 1:
            raise UserError(f"{folder} must hold one tokenizer file, found {len(files)}: prepare the data again")
        return cls(files[0])


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
    return name.endswith(".tiktoken") or (name.endswith(".json") and any(sign in name for sign in ("tok", "tek", "vocab", "bpe")))


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


class _HuggingFace:
    def __init__(self, file: Path) -> None:
        self._model = tokenizers.Tokenizer.from_file(str(file))
        self._model.encode_special_tokens = True
        self.size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())  # ids may have holes
        self.bos = self._find(BOS_NAMES)
        self.eos = self._find(EOS_NAMES)
        self._special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}

    def _find(self, names: Sequence[str]) -> int | None:
        return next((i for i in map(self._model.token_to_id, names) if i is not None), None)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(x.ids, dtype=np.uint32) for x in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids), skip_special_tokens=True))

    def byte_lengths(self) -> list[int]:
        byte_level = isinstance(self._model.decoder, tokenizers.decoders.ByteLevel)
        lengths = [0] * self.size
        for i in range(self.size):
            if i not in self._special and (token := self._model.id_to_token(i)) is not None:
                # a byte-level vocabulary spells every byte with one character
                lengths[i] = len(token) if byte_level else len(self._model.decode([i]).encode())
        return lengths


class _Tiktoken:
    """Mergeable ranks, shifted by ``first`` ids of special tokens before them."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, first: int, bos: int | None, eos: int | None) -> None:
        special = {NO_SPECIAL: max(ranks.values()) + 1}
        self._encoding = tiktoken.Encoding("file", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self._ranks, self._first = ranks, first
        self.size, self.bos, self.eos = first + 1 + max(ranks.values()), bos, eos

    @cached_property
    def _known(self) -> set[int]:
        return set(self._ranks.values())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32]:
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the pattern ran out of its stack, e.g. in a million spaces: halves, until it does not
            if len(text) < 2:
                raise
            half = len(text) // 2
            return np.concatenate([self._encode(text[:half]), self._encode(text[half:])])
        return ids + np.uint32(self._first) if self._first else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([i - self._first for i in ids if i - self._first in self._known])

    def byte_lengths(self) -> list[int]:
        lengths = [0] * self.size
        for token, rank in self._ranks.items():
            lengths[self._first + rank] = len(token)
        return lengths


def _open(file: Path) -> Backend:
    if not file.is_file():
        raise UserError(
            f"tokenizer {file} does not exist: give a tokenizer.json, .tiktoken or tekken file, package:NAME:FILE, or bpe:SIZE"
        )
    try:
        if file.suffix == ".tiktoken":
            lines = [line.split() for line in file.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            return _Tiktoken(ranks, TIKTOKEN_PATTERN, 0, None, None)
        document = json.loads(file.read_text(encoding="utf-8"))
        if "vocab" in document and "config" in document:
            return _open_tekken(document)
        return _HuggingFace(file)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception
        raise UserError(f"tokenizer {file} is no tokenizer.json, .tiktoken or tekken file: {error}") from None


def _open_tekken(document: dict[str, Any]) -> _Tiktoken:
    config = document["config"]
    special = int(config["default_num_special_tokens"])
    kept = int(config["default_vocab_size"]) - special
    ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in document["vocab"][:kept]}
    return _Tiktoken(ranks, config["pattern"], special, bos=1, eos=2)
