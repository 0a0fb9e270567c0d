import hashlib
import json
import random
import re

import pytest

from bitlm_dist.data_prep import words
from bitlm_dist.data_prep.deduplication import Deduplicator
from bitlm_dist.data_prep.filters import NGRAM_SIZE, DecontaminationFilter
from bitlm_dist.data_prep.near_duplicates import MinHasher
from bitlm_dist.errors import UserError

# A sentence in each script without spaces between words.
SENTENCES = {
    "Chinese": "今天早上的天气非常好我们一起去公园散步看见很多小鸟在树上唱歌大家都很高兴",
    "Japanese": "今朝はとても天気が良かったので私たちは公園へ散歩に行きました"
    "そしてコーヒーを飲みました",
    "Thai": "วันนี้อากาศดีมากเราจึงไปเดินเล่นที่สวนสาธารณะและดื่มกาแฟกับเพื่อนๆ",
    "Lao": "ມື້ນີ້ອາກາດດີຫຼາຍພວກເຮົາຈຶ່ງໄປຍ່າງຫຼິ້ນຢູ່ສວນສາທາລະນະແລະດື່ມກາເຟ",
    "Khmer": "ថ្ងៃនេះអាកាសធាតុល្អណាស់យើងទៅដើរលេងនៅសួនច្បារហើយផឹកកាហ្វេ",
    "Burmese": "ဒီနေ့ရာသီဥတုအရမ်းကောင်းလို့ကျွန်တော်တို့ပန်းခြံကိုလမ်းလျှောက်သွားကြတယ်",
    "Tibetan": "དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག་ང་ཚོ་སྤྱི་གླིང་ལ་འཆམ་འཆམ་བྱེད་དུ་འགྲོ",
}


def test_a_character_with_its_marks_is_a_word_and_other_scripts_keep_theirs():
    assert words.split_at_whitespace("Python 3.11 是一种语言, isn't it?") == [
        "python",
        "3.11",
        "是",
        "一",
        "种",
        "语",
        "言",
        ",",
        "isn't",
        "it?",
    ]

    assert words.find_words("Python 3.11 是一种语言, isn't it?") == [
        "python",
        "3",
        "11",
        "是",
        "一",
        "种",
        "语",
        "言",
        "isn",
        "t",
        "it",
    ]

    assert words.find_words("ที่นี่ มาก") == ["ที่", "นี่", "ม", "า", "ก"]
    assert words.find_words("コーヒー、ｶﾞ。") == ["コ", "ー", "ヒ", "ー", "ｶ", "ﾞ"]
    assert words.find_words("你好，世界。《书》𠀀") == list("你好世界书𠀀")


@pytest.mark.parametrize(
    "text",
    [
        "Plain words, here.",
        "Curly \u2019quotes\u2019 \u2014 and ümlauts",
        "привет, мир",
        "हिन्दी में लिखा",
        "한국어는 띄어 쓴다",
        "\U0001f600 ok",
    ],
)
def test_text_with_blanks_is_cut_at_them(text):
    assert words.split_at_whitespace(text) == text.lower().split()
    assert words.find_words(text) == re.findall(r"\w+", text.lower())


def documents(rng, sentence, count=8, size=300):
    """Texts without spaces, followed by a copy of each with a few characters changed."""
    letters = sorted(set(words.find_words(sentence)))
    made = ["".join(rng.choices(letters, k=size)) for _ in range(count // 2)]
    copies = []
    for text in made:
        changed = words.find_words(text)
        for place in rng.sample(range(size), 2):
            changed[place] = rng.choice(letters)
        copies.append("".join(changed))
    return made + copies


def kept(tmp_path, texts):
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    reasons = Deduplicator(tmp_path / "work", exact=True, near_threshold=0.8).drop_reasons(
        hashes, MinHasher().signatures(texts)
    )
    return [i for i, reason in enumerate(reasons) if not reason]


@pytest.mark.parametrize("language", SENTENCES)
def test_near_copies_without_blanks_are_dropped(tmp_path, seed, language):
    pytest.importorskip("rensa")
    assert kept(tmp_path, documents(random.Random(seed), SENTENCES[language])) == [0, 1, 2, 3]


@pytest.mark.parametrize("mix", ["{} and {}", "{}，{}", "In English: {}\n\n{} (translated)"])
def test_near_copies_of_mixed_scripts_are_dropped(tmp_path, seed, mix):
    pytest.importorskip("rensa")
    rng = random.Random(seed)
    english = [
        " ".join(rng.choices(["river", "stone", "lamp", "bread", "seven", "sings", "under"], k=100))
        for _ in range(4)
    ]
    halves = documents(rng, SENTENCES["Chinese"])
    texts = [mix.format(a, b) for a, b in zip(english * 2, halves, strict=True)]
    assert kept(tmp_path, texts) == [0, 1, 2, 3]
    others = [
        mix.format(a, b)
        for a, b in zip(english * 2, documents(rng, SENTENCES["Thai"], 16)[:8], strict=True)
    ]
    assert len(kept(tmp_path / "others", others)) == 8, "half of each text is new"


@pytest.mark.parametrize("language", SENTENCES)
def test_evaluation_text_without_blanks_is_found(tmp_path, seed, language):
    rng = random.Random(seed)
    texts = documents(rng, SENTENCES[language])[:4]
    held = "".join(words.find_words(texts[2])[100:180])
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": held}))
    index = DecontaminationFilter([tmp_path / "eval.jsonl"], 0.1)
    assert [index.is_contaminated(text) for text in texts] == [False, False, True, False]
    assert index.hit_ratio(texts[2]) == pytest.approx(
        (80 - NGRAM_SIZE + 1) / (300 - NGRAM_SIZE + 1)
    )
    assert index.hit_ratio(f"An English frame, {held}, around it.") > 0.8
    assert index.hit_ratio(SENTENCES[language]) == 0
    (tmp_path / "short.txt").write_text("".join(words.find_words(held)[:12]))
    with pytest.raises(UserError, match="no text there has 13 words"):
        DecontaminationFilter([tmp_path / "short.txt"], 0.1)


def test_the_fast_look_misses_no_character_without_blanks(seed):
    spaced = "Curly \u2019quotes\u2019 \u2014 ümlaut, привет, עברית, हिन्दी, 한국어 "
    alone = re.compile(f"[{words.UNSPACED}]")
    rng = random.Random(seed)
    for code in (
        *range(0xE00, 0x1AB0),
        *range(0x3000, 0x3200),
        *rng.sample(range(0x3200, 0x110000), 3000),
    ):
        character = chr(code)
        if not 0xD800 <= code < 0xE000 and alone.match(character):
            assert words._has_unspaced(spaced + character)
    assert not words._has_unspaced(spaced)
