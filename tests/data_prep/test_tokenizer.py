import base64
import json
import sys

import pytest
import tokenizer_kinds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Model

from bitlm_dist.data_prep.tokenizer import Tokenizer, find_tokenizer, train_bpe
from bitlm_dist.data_prep.tokenizer_backends import NO_SPECIAL
from bitlm_dist.errors import UserError

BYTES = [bytes([i]) for i in range(256)]
MERGES = [b"th", b"the", b" the", b"in", b"an"]
VOCABULARY = BYTES + MERGES


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same small byte-level vocabulary in each format."""
    root = tmp_path_factory.mktemp("tokenizers")
    tiktoken = root / "small.tiktoken"
    tiktoken.write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(VOCABULARY))
    )

    tekken = root / "tekken.json"
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(VOCABULARY)
    ]
    config = {
        "pattern": r"\S+|\s+",
        "default_vocab_size": len(VOCABULARY) + 10,
        "default_num_special_tokens": 10,
    }
    tekken.write_text(
        json.dumps({"config": config, "vocab": [*entries, {"rank": 999, "token_bytes": "eHh4"}]})
    )

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
    assert tokenizer.byte_lengths.inside[ids].sum() == len(text.encode())
    assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist())


@pytest.mark.parametrize(
    ("kind", "special", "size"),
    [("tiktoken", (261, 262), 263), ("tekken", (1, 2), 271), ("bpe", (0, 1), 270)],
)
def test_every_vocabulary_has_bos_and_eos(kind, special, size, files):
    tokenizer = Tokenizer(files[kind])
    assert (tokenizer.bos, tokenizer.eos) == special
    assert tokenizer.vocab_size == size
    assert (
        tokenizer.decode([tokenizer.bos, tokenizer.encode_batch(["a"])[0][0], tokenizer.eos]) == "a"
    )


def test_ids_may_have_holes(files, tmp_path):
    holes = tmp_path / "holes.tiktoken"
    holes.write_bytes(files["tiktoken"].read_bytes().replace(b" 260\n", b" 300\n"))
    document = json.loads(files["bpe"].read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    for file, size in ((holes, 303), (tmp_path / "tokenizer.json", 301)):
        tokenizer = Tokenizer(file)
        assert tokenizer.vocab_size == len(tokenizer.byte_lengths.inside) == size
        (ids,) = tokenizer.encode_batch(["an"])
        assert tokenizer.decode([*ids.tolist(), 290]) == "an"


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", [" " * 300_000, "x " + "\t" * 300_000 + "y", "a" * 300_000, NO_SPECIAL + " the"]
)
def test_text_that_breaks_the_pattern_is_encoded_all_the_same(kind, text, files):
    """A long run of spaces overflows tiktoken's regular expression; none may be lost."""
    tokenizer = Tokenizer(files[kind])
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert ids.max() < tokenizer.vocab_size


@pytest.fixture
def package(tmp_path, monkeypatch, files):
    """An installed distribution that ships tokenizers."""
    names = [
        "toks/data/tekken_1.json",
        "toks/data/a.tiktoken",
        "toks/other/a.tiktoken",
        "toks/data/README.md",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(
            files["tekken" if "tekken" in name else "tiktoken"].read_bytes()
        )
    info = tmp_path / "some_toks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-toks\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_a_file_that_a_package_ships_is_found_by_name(package, files):
    found = find_tokenizer("package:some-toks:tekken_1.json")
    assert found == package / "toks/data/tekken_1.json"
    assert Tokenizer(found).vocab_size == Tokenizer(files["tekken"]).vocab_size
    assert (
        find_tokenizer("package:some-toks:toks/other/a.tiktoken")
        == package / "toks/other/a.tiktoken"
    )


BAD_NAMES = [
    (
        "package:some-toks:none.json",
        "some-toks ships toks/data/a.tiktoken, toks/data/tekken_1.json, toks/other/a.tiktoken",
    ),
    (
        "package:some-toks:a.tiktoken",
        "fits several files, write the whole name: toks/data/a.tiktoken, toks/other/a.tiktoken",
    ),
    ("package:some-toks", "some-toks ships toks/data/a.tiktoken"),
    (
        "package:no-such-package:x.json",
        "the package no-such-package is not installed: pip install no-such-package",
    ),
    ("package:numpy:x.json", "numpy ships no file that looks like a tokenizer"),
]


@pytest.mark.parametrize(("name", "message"), BAD_NAMES)
def test_files_that_a_package_does_not_ship_are_explained(package, name, message):
    with pytest.raises(UserError, match=message):
        find_tokenizer(name)


def folder_of(tmp_path, kind, **named):
    """A Hugging Face folder."""
    model = getattr(tokenizer_kinds, kind)()
    model.add_special_tokens(["<|start|>", "<|stop|>"])
    tokenizer_kinds.save(model, tmp_path / kind)
    (tmp_path / kind / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 16, **named})
    )
    (tmp_path / kind / "vocab.json").write_text("{}")
    return tmp_path / kind


def test_a_hugging_face_folder_names_its_special_tokens_and_is_copied_whole(tmp_path):
    folder = folder_of(tmp_path, "qwen", bos_token={"content": "<|start|>"}, eos_token="<|stop|>")
    tokenizer = Tokenizer(folder)
    size = Model.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (size - 2, size - 1, size)
    assert tokenizer.file.name == "tokenizer.json"
    tokenizer.save(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    copy = Tokenizer.from_folder(tmp_path / "copy")
    assert (copy.fingerprint, copy.bos, copy.eos) == (
        tokenizer.fingerprint,
        tokenizer.bos,
        tokenizer.eos,
    )
    assert copy.fingerprint != Tokenizer(folder / "tokenizer.json").fingerprint, (
        "the file alone has other special tokens"
    )


def test_a_document_s_begin_does_not_look_like_its_end(tmp_path):
    """GPT-2's tokenizer_config.json has a single token for BOS and EOS."""
    tokenizer = Tokenizer(
        folder_of(tmp_path, "gpt2", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    )
    assert tokenizer.eos == 0
    assert tokenizer.bos == tokenizer.vocab_size - 1


def test_folders_that_hold_no_tokenizer_are_explained(tmp_path, files):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match="empty holds none of tokenizer.json, tokenizer.model, tekken.json"
    ):
        Tokenizer(tmp_path / "empty")

    for name in ("a.tiktoken", "b.tiktoken"):
        (tmp_path / "empty" / name).write_bytes(files["tiktoken"].read_bytes())
    with pytest.raises(UserError, match="empty holds a.tiktoken, b.tiktoken: name one of them"):
        Tokenizer(tmp_path / "empty")

    for named, message in (
        (
            {"bos_token": "<nowhere>"},
            "bos_token is '<nowhere>', which tokenizer.json does not have",
        ),
        ({"eos_token": 3}, "tokenizer_config.json: eos_token is 3, expected a token"),
    ):
        with pytest.raises(UserError, match=message):
            Tokenizer(folder_of(tmp_path, "gpt2", **named))

    (tmp_path / "gpt2" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json cannot be read"):
        Tokenizer(tmp_path / "gpt2")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    root = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat in the hat and the man"] * 20),
        model_prefix=str(root / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return root / "tokenizer.model"


@settings(deadline=None, max_examples=30)
@given(
    text=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), min_size=1, max_size=30
    )
)
@example(text="</s> the  cat<s>")
@example(text=" the cat\n日")
def test_a_sentencepiece_model_gives_texts_back_and_its_bytes_add_up(sentencepiece_model, text):
    tokenizer = Tokenizer(sentencepiece_model)
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.byte_lengths.of_documents([ids])[0] == len(text.encode())
    assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist())


def test_a_sentencepiece_model_is_found_in_a_folder_and_works_from_its_copy(
    sentencepiece_model, tmp_path
):
    tokenizer = Tokenizer(sentencepiece_model.parent)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, 290)
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.from_folder(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def test_a_model_file_without_its_library_or_of_another_kind_is_explained(
    tmp_path, files, monkeypatch
):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(files["tiktoken"].read_bytes())
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(
            UserError,
            match=r"tokenizer.model needs the package sentencepiece: "
            r"pip install 'bitlm-dist\[sentencepiece\]'",
        ):
            Tokenizer(file)
    pytest.importorskip("sentencepiece")
    with pytest.raises(
        UserError,
        match="tokenizer.model is no tokenizer.json, .tiktoken, tekken or SentencePiece file",
    ):
        Tokenizer(file)
