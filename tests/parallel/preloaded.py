"""Imported by the server that ranks are forked from: everything that training and its tests import, which takes seconds."""

import bitlm_dist.cli
import bitlm_dist.display
import bitlm_dist.training.trainer  # noqa: F401
from bitlm_dist.compilation import no_torch_compile
from bitlm_dist.parallel.cpu import enable_megatron_on_cpu

enable_megatron_on_cpu()
with no_torch_compile():
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
