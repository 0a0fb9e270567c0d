import pytest
import torch

from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.memory_advice import out_of_memory_advice
from bitlm_dist.training.trainer import Trainer

SAID = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. "
    "GPU 0 has a total capacity of 79.10 GiB. Of it 1 GiB is …"
)


def test_the_cheapest_key_comes_first_and_what_is_set_is_not_named():
    error = torch.OutOfMemoryError(SAID)
    advice = out_of_memory_advice(load_config(None, []).config, ParallelLayout(), 8, error)
    assert advice.startswith(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB: "
    )
    assert "\n" not in advice
    assert (
        advice.index("--parallel.micro_batch_size 4")
        < advice.index("--parallel.activation_checkpointing selective")
        < advice.index("--parallel.tensor 2")
    )
    assert "zero_stage" not in advice, "one process has nothing to shard"

    words = ["--parallel.activation_checkpointing", "full", "--optimizer.sharded", "false"]
    advice = out_of_memory_advice(
        load_config(None, words).config, ParallelLayout(data=4, tensor=2), 1, error
    )
    assert "activation_checkpointing" not in advice
    assert "micro_batch_size 0" not in advice
    assert "--parallel.head.zero_stage 3" in advice
    assert "--optimizer.sharded true" in advice
    assert "--parallel.tensor 4" in advice


@pytest.mark.integration
def test_a_step_that_never_fitted_is_the_users_and_a_later_one_is_not(tiny, monkeypatch):
    """The launcher restarts a run unless the user has to fix something."""
    trainer = Trainer.build(tiny()).open()

    def fail(*ignored):
        raise torch.OutOfMemoryError(SAID)

    plain = trainer.engine.train_step
    monkeypatch.setattr(trainer.engine, "train_step", fail)
    with pytest.raises(
        UserError,
        match="a microbatch of 8 sequences does not fit; what helps: --parallel.micro_batch_size 4",
    ):
        trainer.fit()

    monkeypatch.setattr(trainer.engine, "train_step", plain)
    trainer.fit(until=1)
    monkeypatch.setattr(trainer.engine, "train_step", fail)
    with pytest.raises(RuntimeError, match="what helps"):
        trainer.fit()
    trainer.close()
