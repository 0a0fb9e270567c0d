"""A compiler that does not work is detected before the first step."""

import pytest
import torch

from bitlm_dist import compilation
from bitlm_dist.compilation import should_compile
from bitlm_dist.errors import UserError

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.fixture
def trial(monkeypatch):
    """A function that makes the trial compilation report a problem."""
    return lambda problem: monkeypatch.setattr(
        compilation, "_compile_failure_reason", lambda device: problem
    )


@pytest.fixture(autouse=True)
def _compiler(monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_auto_compiles_on_a_gpu_where_that_works(trial, caplog):
    trial(None)
    assert should_compile("auto", GPU)
    assert should_compile("always", CPU)
    assert not should_compile("auto", CPU)
    assert not should_compile("never", GPU)

    trial("no header Python.h")
    assert not should_compile("auto", GPU)
    assert "regions run as they are written, which is slower: no header Python.h" in caplog.messages


def test_always_is_refused_where_it_does_not_work(trial, monkeypatch):
    trial("no header Python.h")
    with pytest.raises(
        UserError, match=r"training.compile = always: no header Python.h: fix it, or use never"
    ):
        should_compile("always", GPU)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no compiler, looked for"):
        should_compile("always", GPU)


def test_a_trial_says_what_ails_the_compiler(monkeypatch):
    def broken(*ignored, **settings):
        raise OSError("cc1plus:\n  not found")

    monkeypatch.setattr(torch, "compile", broken)
    compilation._compile_failure_reason.cache_clear()
    assert (
        compilation._compile_failure_reason(CPU)
        == "torch.compile fails on cpu (OSError: cc1plus: not found)"
    )
    compilation._compile_failure_reason.cache_clear()
