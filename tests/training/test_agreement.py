import torch

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.agreement import Agreement, Flags


def test_one_process_acts_on_its_current_flags():
    flags = Flags(0, 1, 0)
    agreement = Agreement(lambda: flags, ParallelLayout())
    started = agreement.start().tolist()
    flags = Flags(15, 0, 0)
    assert agreement.result(started) == agreement.now() == flags


def test_several_ranks_act_on_the_maximum_of_the_flags_that_they_sent(monkeypatch):
    """Whatever has changed since then, or they would act on different values."""
    flags = Flags(0, 0, 1)
    others = torch.tensor([10, 1, 0])
    monkeypatch.setattr(mesh, "all_reduce_max", lambda value: torch.maximum(value, others))
    agreement = Agreement(lambda: flags, ParallelLayout(data=2))
    started = agreement.start().double().tolist()
    flags = Flags(15, 0, 0)
    assert agreement.result(started) == Flags(10, 1, 1)
    assert agreement.now() == Flags(15, 1, 0)
