"""Tokenizer backends: the libraries tokenizers, tiktoken and sentencepiece.

Files may also ask for truncation, padding, dropout, or BOS and EOS around a text, which serve
batched inference or regularization. A corpus must be encoded in full and deterministically, so
none of these is applied.
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
from numpy.typing import NDArray

from bitlm_dist.data_prep.token_bytes import byte_lengths_from_decoder
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.strict_json import to_json

BOS_NAMES = (
    "<bos>",
    "<s>",
    "<|begin_of_text|>",
    "<|begin▁of▁sentence|>",
    "[BOS]",
    "<|startoftext|>",
)
EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<|endoftext|>", "[EOS]")
UNKNOWN_NAMES = ("<unk>", "[UNK]")  # the only special token that text may become
# tiktoken's encode_to_numpy searches for special tokens. Without any, the empty pattern matches at
# every character, which halves its speed; so it gets one that never occurs.
NO_SPECIAL = "<|\0 no special token \0|>"
# Splits text before merging: the pattern that the vocabulary of GPT-4 and its descendants were
# trained with, but with single digits.
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "▁"  # how SentencePiece spells a space


class Backend(Protocol):
    """Interface to a tokenizer library.

    Attributes:
        vocab_size: One more than the largest id.
        bos, eos: Ids of BOS and EOS, if the file has them.
        not_applied: Descriptions of the encoding settings in the file that are not applied.
    """

    vocab_size: int
    bos: int | None
    eos: int | None
    not_applied: list[str]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode texts to ids, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; invalid UTF-8 becomes the replacement character."""
        ...

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes of each id inside a document and at its beginning; 0 for special tokens."""
        ...


class HuggingFace:
    """A tokenizer.json.

    Args:
        file: The tokenizer.json.
        bos, eos: Tokens named by tokenizer_config.json; None: the first of the usual names that
            is in the vocabulary.
    """

    def __init__(self, file: Path, bos: str | None = None, eos: str | None = None) -> None:
        self._file = file
        self._model = tokenizers.Tokenizer.from_file(str(file))
        self.not_applied = _disable_text_changes(self._model)
        # Ids may have gaps, so the number of tokens is not enough.
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        self.bos = self._first_known_id([bos] if bos else BOS_NAMES)
        self.eos = self._first_known_id([eos] if eos else EOS_NAMES)

        self._special = {
            i for i, token in self._model.get_added_tokens_decoder().items() if token.special
        }
        # A unigram model may encode the spelling of a special token as that token.
        self._is_unwanted = np.zeros(self.vocab_size, dtype=bool)
        if isinstance(self._model.model, tokenizers.models.Unigram):
            unknown = {i for i in map(self._model.token_to_id, UNKNOWN_NAMES) if i is not None}
            self._is_unwanted[list(self._special - unknown)] = True

    def _first_known_id(self, names: Sequence[str]) -> int | None:
        return next((i for i in map(self._model.token_to_id, names) if i is not None), None)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode texts to ids, without special tokens."""
        encoded = [np.array(x.ids, dtype=np.uint32) for x in self._encode_batch(self._model, texts)]

        # Only the affected texts are encoded again, see _without_special.
        if self._is_unwanted.any():
            for i, ids in enumerate(encoded):
                if self._is_unwanted[ids].any():
                    encoded[i] = np.array(
                        self._encode_batch(self._without_special, [texts[i]])[0].ids,
                        dtype=np.uint32,
                    )
        return encoded

    @staticmethod
    def _encode_batch(model: tokenizers.Tokenizer, texts: Sequence[str]) -> list[Any]:
        return model.encode_batch_fast(list(texts), add_special_tokens=False)

    @cached_property
    def _without_special(self) -> tokenizers.Tokenizer:
        """The same tokenizer for texts that spell a special token.

        A unigram model encodes "</s>" as the special token, which has the best score of all. Here
        such tokens have a prohibitive score. As the score of an unknown character depends on the
        lowest score, this tokenizer is not used for other texts.
        """
        document = json.loads(self._file.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        # Scores are log-probabilities, hence negative.
        never = min(score for _, score in vocabulary) * 100 - 1000
        for i in self._is_unwanted.nonzero()[0].tolist():
            if i < len(vocabulary):
                vocabulary[i][1] = never

        model = tokenizers.Tokenizer.from_str(to_json(document))
        _disable_text_changes(model)
        return model

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""
        return str(self._model.decode(list(ids), skip_special_tokens=True))

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes of each id inside a document and at its beginning."""
        tokens = [
            None if i in self._special else self._model.id_to_token(i)
            for i in range(self.vocab_size)
        ]
        return byte_lengths_from_decoder(tokens, self._model.decoder)


def _disable_text_changes(model: tokenizers.Tokenizer) -> list[str]:
    """Disable everything that a tokenizer.json does to a text besides splitting it into tokens.

    Returns:
        Descriptions of what was disabled.
    """
    disabled = []
    if model.truncation:
        disabled.append(f"truncation to {model.truncation['max_length']} tokens")
        model.no_truncation()

    if model.padding:
        disabled.append("padding")
        model.no_padding()

    if getattr(model.model, "dropout", None):
        disabled.append(f"BPE dropout {model.model.dropout:.3g}")
        model.model.dropout = None

    model.encode_special_tokens = True  # a special token spelled in a document is text
    return disabled


class Tiktoken:
    """A tiktoken or tekken file.

    Token ids are mergeable ranks, shifted by the ``num_special_tokens`` ids that come before them.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        num_special_tokens: int,
        bos: int | None,
        eos: int | None,
    ) -> None:
        special = {NO_SPECIAL: max(ranks.values()) + 1}
        self._encoding = tiktoken.Encoding(
            "file", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self._ranks = ranks
        self._num_special_tokens = num_special_tokens

        self.vocab_size = num_special_tokens + 1 + max(ranks.values())
        self.bos = bos
        self.eos = eos
        self.not_applied: list[str] = []

    @classmethod
    def from_file(cls, file: Path) -> "Tiktoken":
        """Open a .tiktoken file: a token in base64 and its rank per line."""
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return cls(ranks, TIKTOKEN_PATTERN, 0, None, None)

    @classmethod
    def from_tekken(cls, document: dict[str, Any]) -> "Tiktoken":
        """Open the JSON of a tekken file."""
        config = document["config"]
        num_special_tokens = int(config["default_num_special_tokens"])
        num_ranks = int(config["default_vocab_size"]) - num_special_tokens
        ranks = {
            base64.b64decode(entry["token_bytes"]): int(entry["rank"])
            for entry in document["vocab"][:num_ranks]
        }
        return cls(ranks, config["pattern"], num_special_tokens, bos=1, eos=2)

    @cached_property
    def _known_ranks(self) -> set[int]:
        return set(self._ranks.values())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode texts to ids, without special tokens."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32]:
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # The regular expression ran out of stack, e.g. on a million spaces: retry with halves.
            if len(text) < 2:
                raise
            half = len(text) // 2
            return np.concatenate([self._encode(text[:half]), self._encode(text[half:])])

        return ids + np.uint32(self._num_special_tokens) if self._num_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""
        return self._encoding.decode(
            [
                i - self._num_special_tokens
                for i in ids
                if i - self._num_special_tokens in self._known_ranks
            ]
        )

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes of each id inside a document and at its beginning."""
        lengths = [0] * self.vocab_size
        for token, rank in self._ranks.items():
            lengths[self._num_special_tokens + rank] = len(token)

        # No spaces are added or dropped at the beginning, so both are the same.
        return lengths, lengths


class SentencePiece:
    """A SentencePiece model, e.g. tokenizer.model."""

    def __init__(self, file: Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                f"tokenizer {file} needs the package sentencepiece: "
                "pip install 'bitlm-dist[sentencepiece]'"
            ) from None

        self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.vocab_size = int(self._model.get_piece_size())
        self.bos, self.eos = (
            i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id())
        )
        self.not_applied: list[str] = []

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode texts to ids, without special tokens."""
        return [
            np.array(self._model.encode(text, add_bos=False, add_eos=False), dtype=np.uint32)
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""
        return str(self._model.decode(list(ids)))

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes of each id inside a document and at its beginning."""
        model = self._model
        inside = [0] * self.vocab_size
        first = [0] * self.vocab_size
        for i in range(self.vocab_size):
            # A single byte of a longer character decodes to a replacement character.
            if model.is_byte(i):
                inside[i] = first[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
                piece = model.id_to_piece(i)
                inside[i] = len(piece.replace(SPACE, " ").encode())
                # Decoding drops the space that encoding prepends to a text.
                first[i] = len(model.decode([i]).encode())

        return inside, first


def open_tokenizer_file(file: Path, bos: str | None = None, eos: str | None = None) -> Backend:
    """Open ``file`` with the library that reads it.

    Args:
        file: A tokenizer.json, .tiktoken, tekken or .model file.
        bos, eos: Tokens named by a tokenizer_config.json beside it.

    Raises:
        UserError: The file is missing, damaged or of another kind, or its library is not installed.
    """
    if not file.is_file():
        raise UserError(
            f"tokenizer {file} does not exist: give a tokenizer.json, .tiktoken, tekken or "
            "SentencePiece .model file, a folder that holds one, package:NAME:FILE, or bpe:SIZE"
        )

    try:
        if file.suffix == ".tiktoken":
            return Tiktoken.from_file(file)
        if file.suffix == ".model":
            return SentencePiece(file)

        # tekken and Hugging Face files are both JSON.
        document = json.loads(file.read_text(encoding="utf-8"))
        if "vocab" in document and "config" in document:
            return Tiktoken.from_tekken(document)
        return HuggingFace(file, bos, eos)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"tokenizer {os_error_message(error)}") from None
    except Exception as error:  # the libraries raise bare Exception
        reason = " ".join(str(error).split())
        raise UserError(
            f"tokenizer {file} is no tokenizer.json, .tiktoken, tekken or SentencePiece file: "
            f"{reason}"
        ) from None
