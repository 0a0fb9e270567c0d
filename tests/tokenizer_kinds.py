"""Small tokenizers built like well-known ones, with their various normalizers and decoders."""

from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

LETTERS = [*"abcdefghijklmnopqrstuvwxyzTHE", *".,<>/s!?0123456789"]
BLANK = "▁"
SPECIAL = ["<unk>", "<s>", "</s>"]


def _merged(base: list[str], blank: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Make a BPE vocabulary over ``base``. Returns it and its merges."""
    merges = [
        ("t", "h"),
        ("th", "e"),
        (blank, "the"),
        ("i", "n"),
        (blank, "in"),
        ("c", "a"),
        ("ca", "t"),
        (blank, "cat"),
    ]
    merges += [(blank, blank), (blank * 2, blank * 2)]
    return {
        token: i for i, token in enumerate(dict.fromkeys([*base, *map("".join, merges)]))
    }, merges


def _with_byte_fallback() -> Tokenizer:
    base = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), BLANK, *LETTERS, "é"]
    vocabulary, merges = _merged(base, BLANK)
    model = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    model.add_special_tokens(SPECIAL)
    return model


def llama() -> Tokenizer:
    """A space is prepended to the text; the decoder removes the first one."""
    model = _with_byte_fallback()
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    steps = [
        decoders.Replace(BLANK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    model.decoder = decoders.Sequence(steps)
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return model


def gemma() -> Tokenizer:
    """No space is prepended; tokens of several line feeds are added tokens."""
    model = _with_byte_fallback()
    model.normalizer = normalizers.Replace(" ", BLANK)
    model.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    model.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<h1>", normalized=False)])
    return model


def _byte_level(decoder: decoders.Decoder) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = _merged(["<|endoftext|>", *alphabet], "Ġ")
    model = Tokenizer(models.BPE(vocabulary, merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoder
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    model.add_special_tokens(["<|endoftext|>"])
    return model


def gpt2() -> Tokenizer:
    """Byte-level: every byte is spelled with one character."""
    return _byte_level(decoders.ByteLevel())


def qwen() -> Tokenizer:
    """Byte-level after a regular expression, with added tokens of text.

    One of these has a character that spells no byte.
    """
    model = _byte_level(decoders.ByteLevel())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("日 本", normalized=False)]
    )
    return model


def bytes_in_a_sequence() -> Tokenizer:
    """ByteLevel is one of several decoders in a sequence."""
    return _byte_level(decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]))


def t5() -> Tokenizer:
    """Unigrams with Metaspace in encoder and decoder.

    Special tokens have a higher score than any text; unknown characters become bytes.
    """
    pieces = [(token, 0.0) for token in SPECIAL] + [
        (f"<0x{byte:02X}>", -20.0) for byte in range(256)
    ]
    pieces += [(token, -5.0) for token in [BLANK, *LETTERS]] + [
        (f"{BLANK}the", -3.0),
        (f"{BLANK}cat", -3.0),
    ]
    model = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="always")
    model.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(BLANK, prepend_scheme="always")]
    )
    model.add_special_tokens(SPECIAL)
    return model


def bert() -> Tokenizer:
    """WordPiece: lower-cased and without spaces, so it gives no text back."""
    pieces = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
        "the",
        "cat",
    ]
    model = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(pieces)}, unk_token="[UNK]")
    )
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    model.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return model


def lower_case() -> Tokenizer:
    """Byte-level on lower-cased text: the number of bytes is right, the bytes are not."""
    model = gpt2()
    model.normalizer = normalizers.Lowercase()
    return model


LOSSLESS = {kind.__name__: kind for kind in (llama, gemma, gpt2, qwen, bytes_in_a_sequence)}


def save(model: Tokenizer, folder: Path) -> Path:
    """Write tokenizer.json. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
