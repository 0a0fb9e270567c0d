import base64
import json

import pytest
from bitlm_dist.data_prep.tokenizer import Tokenizer, train_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist.errors import UserError

BYTES = [bytes([i]) for i in range(256)]
MERGES = [b"th", b"the", b" the", b"in", b"an"]
VOCABULARY = BYTES + MERGES


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same little byte-level vocabulary in each format."""
    root = tmp_path_factory.mktemp("tokenizers")
    tiktoken = root / "small.tiktoken"
    tiktoken.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(VOCABULARY)))
    tekken = root / "tekken.json"
    entries = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(VOCABULARY)]
    config = {"pattern": r"\S+|\s+", "default_vocab_size": len(VOCABULARY) + 10, "default_num_special_tokens": 10}
    tekken.write_text(json.dumps({"config": config, "vocab": [*entries, {"rank": 999, "token_bytes": "eHh4"}]}))
    bpe = root / "tokenizer.json"
    train_bpe(["the cat in the hat and the man"] * 20, 270, bpe)
    return {"tiktoken": tiktoken, "tekken": tekken, "bpe": bpe}


KINDS = ["tiktoken", "tekken", "bpe"]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=40))
def test_round_trip_and_byte_lengths(kind, files, text):
    tokenizer = Tokenizer(files[kind])
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist())


@pytest.mark.parametrize(
    ("kind", "special", "size"), [("tiktoken", (261, 262), 263), ("tekken", (1, 2), 271), ("bpe", (0, 1), 270)]
)
def test_every_vocabulary_has_bos_and_eos(kind, special, size, files):
    tokenizer = Tokenizer(files[kind])
    assert (tokenizer.bos, tokenizer.eos) == special
    assert tokenizer.vocabulary == size
    assert tokenizer.decode([tokenizer.bos, tokenizer.encode_batch(["a"])[0][0], tokenizer.eos]) == "a"


def test_the_spelling_of_a_special_token_stays_text(files):
    tokenizer = Tokenizer(files["bpe"])
    (ids,) = tokenizer.encode_batch(["a <eos> b"])
    assert tokenizer.eos not in ids
    assert tokenizer.decode(ids.tolist()) == "a <eos> b"


def test_files_that_are_no_tokenizer_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer(tmp_path / "none.json")
    for name, content in (("x.json", "{}"), ("x.tiktoken", "not base64 at all"), ("y.json", "{")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name} is no tokenizer"):
            Tokenizer(tmp_path / name)
