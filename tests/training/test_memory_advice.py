import pytest
import torch

from bitlm_dist.config_loading import load
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.training.memory_advice import out_of_memory
from bitlm_dist.training.trainer import Trainer

SAID = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB. Of it 1 GiB is …"


def test_the_cheapest_key_comes_first_and_what_is_set_is_not_named():
    error = torch.OutOfMemoryError(SAID)
    advice = out_of_memory(load(None, []).config, Layout(), 8, error)
    assert advice.startswith("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB: ")
    assert "\n" not in advice
    assert advice.index("--parallel.microbatch 4") < advice.index("--parallel.recompute full") < advice.index("--parallel.tensor 2")
    assert "zero_stage" not in advice, "one process has nothing to shard"

    words = ["--parallel.recompute", "full", "--optimizer.sharded", "false"]
    advice = out_of_memory(load(None, words).config, Layout(data=4, tensor=2), 1, error)
    assert "recompute" not in advice
    assert "microbatch 0" not in advice
    assert "--head.zero_stage 3" in advice
    assert "--optimizer.sharded true" in advice
    assert "--parallel.tensor 4" in advice


@pytest.mark.integration
def test_a_step_that_never_fitted_is_the_users_and_a_later_one_is_not(tiny, monkeypatch):
    """The launcher starts a run again unless the user has to mend something."""
    trainer = Trainer(tiny())

    def fail(*ignored):
        raise torch.OutOfMemoryError(SAID)

    plain = trainer.engine.step
    monkeypatch.setattr(trainer.engine, "step", fail)
    with pytest.raises(UserError, match="a microbatch of 8 sequences does not fit; what helps: --parallel.microbatch 4"):
        trainer.train_step()
    monkeypatch.setattr(trainer.engine, "step", plain)
    trainer.train_step()
    monkeypatch.setattr(trainer.engine, "step", fail)
    with pytest.raises(RuntimeError, match="what helps"):
        trainer.train_step()
    trainer.close()
