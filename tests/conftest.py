import json
import random
import subprocess
from pathlib import Path

import pytest
import torch

from bitlm_dist.config_loading import load

WORDS = [
    "the",
    "of",
    "and",
    "light",
    "water",
    "earth",
    "day",
    "night",
    "king",
    "said",
    "unto",
    "them",
    "house",
    "land",
    "people",
    "shall",
    "come",
    "go",
    "great",
    "small",
]


def text_of(seed: int, words: int) -> str:
    """Text with structure a model can learn: word pairs follow each other."""
    rng = random.Random(seed)
    out = []
    while len(out) < words:
        first = rng.randrange(len(WORDS))
        out += [WORDS[first], WORDS[(first + 1) % len(WORDS)]]
    return " ".join(out) + ".\n"


@pytest.fixture
def seed(request):
    """A fresh seed, printed so that a failure can be repeated (pytest shows it)."""
    value = random.SystemRandom().randrange(2**31)
    print(f"seed = {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with four MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = (json.dumps({"text": text_of(i, 40 + 17 * (i % 9))}) for i in range(200))
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    """A small prepared folder."""
    from bitlm_dist.data_prep.prepare import prepare

    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare([corpus], "bpe:300", out, validation=0.1)
    return out


TINY = """
data: {sequence_length: 32}
model:
  block_size: 4
  backbone: {layers: 2, width: 32, heads: 4, kv_heads: 2, head_width: 8, ffn_width: 48}
head: {layers: 2, width: 32, heads: 2, group: 3, components: 2}
training: {steps: 6, global_batch_tokens: 256}
optimizer: {warmup_steps: 2}
logging: {tensorboard: false}
"""


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    """Config of a model that trains in a second."""
    file = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture
def tiny(tmp_path, prepared, tiny_file):
    """(overrides) -> the tiny config with the small prepared folder."""

    def make(*overrides: str):
        return load(tiny_file, ["--run.dir", str(tmp_path / "run"), "--data.path", str(prepared), *overrides]).config

    make.file = tiny_file
    return make


@pytest.fixture
def tiny_model(tiny):
    """(overrides) -> an untrained model of the tiny config, its final layers random instead of zero."""
    from bitlm_dist.codes import BitCodes, natural
    from bitlm_dist.model.bitlm import BitLM

    def make(*overrides: str, vocabulary: int = 300):
        config = tiny(*overrides)
        model = BitLM(config, BitCodes(natural(vocabulary), (vocabulary - 1).bit_length()), eos=1)
        for parameter in model.head.parameters():
            if parameter.dim() == 2 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make
