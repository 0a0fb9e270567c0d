import ctypes
import difflib
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from contextlib import contextmanager
from pathlib import Path

# numpy and torch read these when they are loaded: sums of other parts are other sums.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `bitlm prep` does
os.environ.pop("COLUMNS", None)  # tables are as wide as each test says
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import hypothesis
import pytest
from _pytest.mark.expression import Expression
from janitor import RUN_VARIABLE as RUN

from bitlm_dist.config_loading import load_config
from bitlm_dist.cpu_threads import set_cpu_environment

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "data_prep" / "sample" / "kjv.jsonl.zst"
SEE_GPUS = "BITLM_TESTS_SEE_GPUS"  # =1: tests without the marker `gpu` see GPUs, too
# The longest modules start first, so that no worker is left alone with one of them at the end.
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
    "training/test_resume.py",
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


def make_text(seed: int, num_words: int) -> str:
    """Text with structure that a model can learn: certain words follow each other."""
    rng = random.Random(seed)
    out = []
    while len(out) < num_words:
        first = rng.randrange(len(WORDS))
        out += [WORDS[first], WORDS[(first + 1) % len(WORDS)]]
    return " ".join(out) + ".\n"


def pytest_configure(config):
    """Set the environment up, and start a janitor that cleans up after the run.

    The run gets a folder of its own, which the janitor removes however the run ends.
    """
    _check_markers(config)
    # A shell ignores it in what it starts with `&`, and so would every process of the tests.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Without GPUs, as other tests compare results with those of a CPU bit by bit.
    if not _wants_gpus(config) and os.environ.get(SEE_GPUS) != "1":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    set_cpu_environment(os.environ)  # before torch is loaded

    # The runner of the mutants has loaded its own profile.
    if hypothesis.settings.get_current_profile_name() != "mutants":
        # No deadline: speed is measured by the benchmarks.
        hypothesis.settings.register_profile("suite", deadline=None)
        hypothesis.settings.load_profile("suite")

    # Another process of the run has started the janitor, or the user keeps the folder.
    if (
        hasattr(config, "workerinput")
        or RUN in os.environ
        or config.option.basetemp
        or config.option.collectonly
    ):
        return

    folder = tempfile.mkdtemp(prefix="bitlm-tests-")
    os.environ[RUN] = str(uuid.uuid4())
    janitor = [sys.executable, str(HERE / "janitor.py"), os.environ[RUN], folder]
    environment = {name: value for name, value in os.environ.items() if name != RUN}

    # The pipe closes when this process ends, however it does: executed children do not inherit it.
    config.janitor = subprocess.Popen(
        janitor, stdin=subprocess.PIPE, env=environment, start_new_session=True
    )

    config.option.basetemp = os.path.join(folder, "t")
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None


def _wants_gpus(config):
    """True if `-m` selects only tests with the marker `gpu`."""
    expression = Expression.compile(config.option.markexpr or "True")
    with_gpu, without = (
        expression.evaluate(lambda word, gpu=gpu, **named: gpu and word == "gpu")
        for gpu in (True, False)
    )
    return with_gpu and not without


def _check_markers(config):
    """Refuse unknown markers.

    Otherwise `-m slwo` would silently select nothing, and `-m "not slwo"` everything.
    """
    markers = {
        line.partition(":")[0].partition("(")[0].strip() for line in config.getini("markers")
    }
    for word in re.findall(r"[^\W\d]\w*", config.option.markexpr or ""):
        if word not in markers | {"and", "or", "not", "True", "False"}:
            close_matches = difflib.get_close_matches(word, markers, 1)
            meant = (
                f": did you mean {close_matches[0]}?"
                if close_matches
                else f": choose from {', '.join(sorted(markers))}"
            )
            raise pytest.UsageError(
                f"-m {config.option.markexpr}: no test has the marker {word!r}{meant}"
            )


def pytest_collection_modifyitems(items):
    """Order the modules by LONGEST_FIRST."""

    def place(item):
        name = item.path.relative_to(HERE).as_posix()
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.fixture
def seed(request):
    """A fresh seed, printed so that a failure can be reproduced (pytest shows it)."""
    import torch

    value = random.SystemRandom().randrange(2**31)
    print(f"seed = {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of four MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False
    ).returncode:
        pytest.skip("needs the right to mount a tmpfs")

    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A file of 200 short documents."""
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = (json.dumps({"text": make_text(i, 40 + 17 * (i % 9))}) for i in range(200))
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    """A small prepared folder."""
    from bitlm_dist.data_prep.prepare import prepare

    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare([corpus], "bpe:300", out, validation_fraction=0.1)
    return out


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    """Data of the quickstart, prepared once for all workers of a run."""
    from bitlm_dist.data_prep.prepare import prepare

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "sample"
    with (shared / "sample.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare([SAMPLE], "bpe:4096", out)  # a no-op for all workers but the first
    return out


TINY = """
data: {sequence_length: 32}
model:
  block_size: 4
  backbone: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, head_dim: 8,
             ffn_hidden_size: 48}
head: {num_layers: 2, hidden_size: 32, num_heads: 2%s}
training: {steps: 6, global_batch_tokens: 256}
optimizer: {warmup_steps: 2}
logging: {tensorboard: false}
"""


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    """Config of a model that trains in a second."""
    file = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    file.write_text(TINY % ", bits_per_group: 3, num_mixture_components: 2")
    # the paper's head has no such keys
    file.with_name("tiny-paper.yaml").write_text(TINY % "")
    return file


@pytest.fixture
def tiny(tmp_path, prepared, tiny_file):
    """Factory of the tiny config with the small prepared folder, from overrides."""

    def make(*overrides: str):
        is_paper = "paper" in overrides
        return load_config(
            tiny_file.with_name("tiny-paper.yaml") if is_paper else tiny_file,
            ["--run.dir", str(tmp_path / "run"), "--data.path", str(prepared), *overrides],
        ).config

    make.file = tiny_file
    return make


@pytest.fixture
def tiny_model(tiny):
    """Factory of untrained tiny models with random instead of zero final layers."""
    import torch

    from bitlm_dist.codes import BitCodes, natural_codes
    from bitlm_dist.model.build import build_model

    def make(*overrides: str, vocabulary: int = 300):
        config = tiny(*overrides)
        model = build_model(
            config, BitCodes(natural_codes(vocabulary), (vocabulary - 1).bit_length()), eos=1
        )
        # Layers that start at zero would hide errors in what comes before them.
        for parameter in model.head.parameters():
            if parameter.dim() >= 2 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture
def without_root_powers():
    """Context in which root, too, is refused what the mode of a file does not allow."""
    return _without_file_capabilities


@contextmanager
def _without_file_capabilities():
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, data) == 0, os.strerror(ctypes.get_errno())

    effective = data[0]
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = effective
        assert libc.capset(header, data) == 0
