"""The libraries behind :class:`~bitlm_dist.data_prep.tokenizer.Tokenizer`: tokenizers, tiktoken and sentencepiece.

What a file asks for beside its vocabulary (truncation, padding, dropout, BOS or EOS around a text) serves inference in batches or
regularization. A corpus must be encoded whole and the same way every time, so none of it is applied.
"""

import base64
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers
from bitlm_dist.data_prep.token_bytes import by_decoder
from numpy.typing import NDArray

from bitlm_dist.errors import UserError
from bitlm_dist.files import to_json

BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|begin▁of▁sentence|>", "[BOS]", "<|startoftext|>")
EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<|endoftext|>", "[EOS]")
UNKNOWN_NAMES = ("<unk>", "[UNK]")  # the one special token that text may become
# tiktoken's encode_to_numpy looks for special tokens, and for none at all at every single character: half its speed
NO_SPECIAL = "<|\0 no special token \0|>"
# Splits text before merging; the pattern that GPT-4's vocabulary and its descendants were trained with, digits one by one.
TIKTOKEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACE = "▁"  # how SentencePiece spells a blank


class Backend(Protocol):
    """What a tokenizer library must do; ids below ``size``.

    Attributes:
        not_applied: what the file asks for at encoding and does not get, in words.
    """

    size: int
    bos: int | None
    eos: int | None
    not_applied: list[str]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Texts to ids, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; broken UTF-8 becomes the replacement character."""
        ...

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes that each id stands for inside a document and at its beginning; 0 for special tokens."""
        ...


class HuggingFace:
    """A tokenizer.json.

    Args:
        file: the tokenizer.json.
        bos, eos: tokens that tokenizer_config.json names; None: those that usually serve.
    """

    def __init__(self, file: Path, bos: str | None = None, eos: str | None = None) -> None:
        self._file = file
        self._model = tokenizers.Tokenizer.from_file(str(file))
        self.not_applied = _switch_off(self._model)
        self.size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())  # ids may have holes
        self.bos = self._find([bos] if bos else BOS_NAMES)
        self.eos = self._find([eos] if eos else EOS_NAMES)
        self._special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        self._unwanted = np.zeros(self.size, dtype=bool)
        if isinstance(self._model.model, tokenizers.models.Unigram):
            unknown = {i for i in map(self._model.token_to_id, UNKNOWN_NAMES) if i is not None}
            self._unwanted[list(self._special - unknown)] = True

    def _find(self, names: Sequence[str]) -> int | None:
        return next((i for i in map(self._model.token_to_id, names) if i is not None), None)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Texts to ids, without special tokens."""
        encoded = [np.array(x.ids, dtype=np.uint32) for x in self._encoded(self._model, texts)]
        if self._unwanted.any():
            for i, ids in enumerate(encoded):
                if self._unwanted[ids].any():
                    encoded[i] = np.array(self._encoded(self._without_special, [texts[i]])[0].ids, dtype=np.uint32)
        return encoded

    @staticmethod
    def _encoded(model: tokenizers.Tokenizer, texts: Sequence[str]) -> list[Any]:
        return model.encode_batch_fast(list(texts), add_special_tokens=False)

    @cached_property
    def _without_special(self) -> tokenizers.Tokenizer:
        """The same tokenizer, for texts that spell a special token: a unigram model takes "</s>" for one, and likes it best of all.

        The score of an unknown character depends on the lowest score, so this one is not used for other texts.
        """
        document = json.loads(self._file.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        never = min(score for _, score in vocabulary) * 100 - 1000
        for i in self._unwanted.nonzero()[0].tolist():
            if i < len(vocabulary):
                vocabulary[i][1] = never
        model = tokenizers.Tokenizer.from_str(to_json(document))
        _switch_off(model)
        return model

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return str(self._model.decode(list(ids), skip_special_tokens=True))

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes of each id inside a document and at its beginning."""
        tokens = [None if i in self._special else self._model.id_to_token(i) for i in range(self.size)]
        return by_decoder(tokens, self._model.decoder)


def _switch_off(model: tokenizers.Tokenizer) -> list[str]:
    """Switch off what a tokenizer.json does to a text beside splitting it into tokens -> what that was."""
    found = []
    if model.truncation:
        found.append(f"truncation to {model.truncation['max_length']} tokens")
        model.no_truncation()
    if model.padding:
        found.append("padding")
        model.no_padding()
    if getattr(model.model, "dropout", None):
        found.append(f"BPE dropout {model.model.dropout:.3g}")
        model.model.dropout = None
    model.encode_special_tokens = True  # the spelling of a special token in a document stays text
    return found


class Tiktoken:
    """Mergeable ranks, shifted by ``first`` ids of special tokens before them."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, first: int, bos: int | None, eos: int | None) -> None:
        special = {NO_SPECIAL: max(ranks.values()) + 1}
        self._encoding = tiktoken.Encoding("file", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self._ranks, self._first = ranks, first
        self.size, self.bos, self.eos = first + 1 + max(ranks.values()), bos, eos
        self.not_applied: list[str] = []

    @classmethod
    def of_file(cls, file: Path) -> "Tiktoken":
        """A .tiktoken file: base64 and rank by line."""
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return cls(ranks, TIKTOKEN_PATTERN, 0, None, None)

    @classmethod
    def of_tekken(cls, document: dict[str, Any]) -> "Tiktoken":
        """The JSON of a tekken file."""
        config = document["config"]
        special = int(config["default_num_special_tokens"])
        kept = int(config["default_vocab_size"]) - special
        ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in document["vocab"][:kept]}
        return cls(ranks, config["pattern"], special, bos=1, eos=2)

    @cached_property
    def _known(self) -> set[int]:
        return set(self._ranks.values())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Texts to ids, without special tokens."""
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
        """Ids to text."""
        return self._encoding.decode([i - self._first for i in ids if i - self._first in self._known])

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes of each id inside a document and at its beginning."""
        lengths = [0] * self.size
        for token, rank in self._ranks.items():
            lengths[self._first + rank] = len(token)
        return lengths, lengths


class SentencePiece:
    """A SentencePiece model, e.g. tokenizer.model."""

    def __init__(self, file: Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"tokenizer {file} needs the package sentencepiece: pip install 'bitlm-dist[sentencepiece]'") from None
        self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.size = int(self._model.get_piece_size())
        self.bos, self.eos = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        self.not_applied: list[str] = []

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Texts to ids, without special tokens."""
        return [np.array(self._model.encode(text, add_bos=False, add_eos=False), dtype=np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return str(self._model.decode(list(ids)))

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes of each id inside a document and at its beginning."""
        model = self._model
        inside, first = [0] * self.size, [0] * self.size
        for i in range(self.size):
            if model.is_byte(i):
                inside[i] = first[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
                piece = model.id_to_piece(i)
                inside[i] = len(piece.replace(SPACE, " ").encode())
                first[i] = len(model.decode([i]).encode())  # without the blank that encoding put there
        return inside, first


def open_file(file: Path, bos: str | None = None, eos: str | None = None) -> Backend:
    """The library that reads ``file``.

    Args:
        file: tokenizer.json, .tiktoken, tekken or .model file.
        bos, eos: tokens that a tokenizer_config.json beside it names.

    Raises:
        UserError: the file is missing, damaged, of another kind, or its library is not installed.
    """
    if not file.is_file():
        raise UserError(
            f"tokenizer {file} does not exist: give a tokenizer.json, .tiktoken, tekken or SentencePiece .model file, "
            "a folder that holds one, package:NAME:FILE, or bpe:SIZE"
        )
    try:
        if file.suffix == ".tiktoken":
            return Tiktoken.of_file(file)
        if file.suffix == ".model":
            return SentencePiece(file)
        document = json.loads(file.read_text(encoding="utf-8"))
        if "vocab" in document and "config" in document:
            return Tiktoken.of_tekken(document)
        return HuggingFace(file, bos, eos)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception
        reason = " ".join(str(error).split())
        raise UserError(f"tokenizer {file} is no tokenizer.json, .tiktoken, tekken or SentencePiece file: {reason}") from None
