"""Imports of training and its tests, which take seconds.

The server from which ranks are forked loads this module once.
"""

import bitlm_dist.cli
import bitlm_dist.cli.progress
import bitlm_dist.training.trainer  # noqa: F401
from bitlm_dist.compilation import no_torch_compile
from bitlm_dist.parallel.cpu import enable_megatron_on_cpu

enable_megatron_on_cpu()
with no_torch_compile():
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
