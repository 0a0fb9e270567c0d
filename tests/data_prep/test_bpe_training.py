import psutil
import pytest

from bitlm_dist.data_prep import bpe_training
from bitlm_dist.data_prep.bpe_training import requested_bpe_size, train_bpe_in_child
from bitlm_dist.data_prep.tokenizer import train_bpe
from bitlm_dist.errors import UserError

pytestmark = pytest.mark.integration

TEXTS = [f"the cat in the hat and the man {i}, für immer" for i in range(50)]
BYTES = [text.encode() for text in TEXTS]


def no_matter() -> None:
    pass


def child_beside(others):
    """The child of this process that is not among ``others``, whatever its number."""
    (child,) = set(psutil.Process().children()) - set(others)
    return child


@pytest.mark.parametrize("name", ["bpe:", "bpe:257", "bpe:-300", "bpe:3e3", "bpe:²⁵⁹", "bpe:many"])
def test_a_size_that_is_none_is_refused_with_an_example(name):
    with pytest.raises(UserError, match=r"write bpe:SIZE with a size of at least 258, e.g. bpe:4"):
        requested_bpe_size(name)


def test_a_size_is_read_and_other_tokenizers_have_none():
    assert requested_bpe_size("bpe:258") == 258
    assert requested_bpe_size("folder/bpe:258") is None


def test_the_child_trains_the_same_tokenizer_in_however_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe_training, "BATCH_BYTES", 200)
    train_bpe(TEXTS, 300, tmp_path / "here.json")
    said = []
    before = psutil.Process().children()
    usage = train_bpe_in_child(
        BYTES, 300, tmp_path / "there.json", lambda: said.append(child_beside(before))
    )
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()
    assert usage.peak_memory_bytes > 10e6
    assert len(said) == 1
    assert said[0] not in psutil.Process().children()


def test_no_more_text_is_read_than_is_trained_on(monkeypatch):
    monkeypatch.setattr(bpe_training, "BATCH_BYTES", 10)
    monkeypatch.setattr(bpe_training, "MAX_BPE_BYTES", 25)
    texts = iter([b"123456"] * 9)
    assert [len(batch) for batch in bpe_training._batches(texts)] == [2, 2, 1]
    assert len(list(texts)) == 4


def test_what_ends_the_child_is_said_and_no_child_stays(tmp_path):
    before = psutil.Process().children()

    def kill_the_child() -> None:
        child_beside(before).kill()

    with pytest.raises(UserError, match=r"tokenizer ended with code -9 .*ran out of memory"):
        train_bpe_in_child(BYTES, 300, tmp_path / "t.json", kill_the_child)

    # an error of the child keeps the path
    with pytest.raises(FileNotFoundError) as missing:
        train_bpe_in_child(BYTES, 300, tmp_path / "none" / "t.json", no_matter)
    assert missing.value.filename == str(tmp_path / "none" / "t.json")

    def broken_texts():
        yield BYTES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bpe_in_child(broken_texts(), 300, tmp_path / "t.json", no_matter)
    assert psutil.Process().children() == before
    assert list(tmp_path.iterdir()) == []
