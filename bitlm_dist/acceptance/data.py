"""Text and tokenizer of the acceptance run: the sample text, for a vocabulary of any size.

Every byte is a token; the rest of the vocabulary never occurs. What a model costs does not depend
on which tokens occur, so a softmax over 151,936 tokens costs what it costs with a real tokenizer.
"""

import itertools
from pathlib import Path

import tokenizers
import zstandard

import bitlm_dist.data_prep

SAMPLE = Path(bitlm_dist.data_prep.__file__).parent / "sample" / "kjv.jsonl.zst"
SPECIAL_TOKENS = ("<bos>", "<eos>")


def write_tokenizer(file: Path, vocab_size: int) -> None:
    """Write a tokenizer.json of one token per byte, filled up to ``vocab_size`` tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    num_unused = vocab_size - len(alphabet) - len(SPECIAL_TOKENS)
    tokens = [*SPECIAL_TOKENS, *alphabet, *(f"unused{number}" for number in range(num_unused))]

    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(file))


def write_text(file: Path, num_documents: int | None) -> None:
    """Write the first documents of the sample text, or all of them, as JSON lines."""
    with zstandard.open(SAMPLE, "rt", encoding="utf-8") as lines, file.open("w") as out:
        out.writelines(itertools.islice(lines, num_documents))
