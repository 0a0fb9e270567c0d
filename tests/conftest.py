import difflib
import fcntl
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import hypothesis
import pytest
from _pytest.mark.expression import Expression
from janitor import VARIABLE as RUN

from bitlm_dist.config_loading import load
from bitlm_dist.cpu_threads import set_cpu_environment

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "data_prep" / "sample" / "kjv.jsonl.zst"
SEE_GPUS = "BITLM_TESTS_SEE_GPUS"  # =1: tests without the mark `gpu` see GPUs too
# Modules that take longest start first, so that no worker is left alone with one of them at the end.
LONGEST_FIRST = (
    "slurm/test_launch.py",
    "kernels/test_triton.py",
    "parallel/test_zero_head.py",
    "parallel/test_jobs.py",
    "parallel/test_parity.py",
    "faults/test_kills.py",
    "launch/test_local.py",
    "slurm/test_cluster.py",
    "kernels/test_aot.py",
    "planning/test_trace.py",
    "training/test_trainer.py",
)
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


def pytest_configure(config):
    """Refuse markers that do not exist; have a janitor clean up after the run, in a folder that is the run's own."""
    _check_markers(config)
    if not _wants_gpus(config) and os.environ.get(SEE_GPUS) != "1":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # other tests compare with what a CPU computes, bit by bit
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
    set_cpu_environment(os.environ)  # before torch is loaded
    if hypothesis.settings.get_current_profile_name() != "mutants":  # their runner stops at the first example
        hypothesis.settings.register_profile("suite", deadline=None)  # speed is the bench's business
        hypothesis.settings.load_profile("suite")
    if hasattr(config, "workerinput") or RUN in os.environ or config.option.basetemp or config.option.collectonly:
        return  # another process of the run did so, or the user keeps the folder

    folder = tempfile.mkdtemp(prefix="bitlm-tests-")
    os.environ[RUN] = str(uuid.uuid4())
    janitor = [sys.executable, str(HERE / "janitor.py"), os.environ[RUN], folder]
    environment = {name: value for name, value in os.environ.items() if name != RUN}
    # The pipe closes when this process ends, however it does: children that are executed do not inherit it.
    config.janitor = subprocess.Popen(janitor, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    config.option.basetemp = os.path.join(folder, "t")
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None


def _wants_gpus(config):
    """Whether `-m` selects tests that have the mark `gpu` and none that do not."""
    expression = Expression.compile(config.option.markexpr or "True")
    with_gpu, without = (expression.evaluate(lambda word, gpu=gpu, **named: gpu and word == "gpu") for gpu in (True, False))
    return with_gpu and not without


def _check_markers(config):
    """`-m slwo` would select nothing, and `-m "not slwo"` everything, without a word."""
    known = {line.partition(":")[0].partition("(")[0].strip() for line in config.getini("markers")}
    for word in re.findall(r"[^\W\d]\w*", config.option.markexpr or ""):
        if word not in known | {"and", "or", "not", "True", "False"}:
            near = difflib.get_close_matches(word, known, 1)
            meant = f": did you mean {near[0]}?" if near else f": choose from {', '.join(sorted(known))}"
            raise pytest.UsageError(f"-m {config.option.markexpr}: no test has the marker {word!r}{meant}")


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.relative_to(HERE).as_posix()
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.fixture
def seed(request):
    """A fresh seed, printed so that a failure can be repeated (pytest shows it)."""
    import torch

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


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    """What the quickstart trains on, prepared once for all workers of a run."""
    from bitlm_dist.data_prep.prepare import prepare

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "sample"
    with (shared / "sample.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare([SAMPLE], "bpe:4096", out)  # the second time it is there already
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
    import torch

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
