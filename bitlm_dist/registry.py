"""Optimizers and partitioners by name; their classes are imported only when they are used."""

import importlib
from collections.abc import Mapping
from typing import Any

# Names that `optimizer.matrix_optimizer` may have, with their update rules.
OPTIMIZERS = {
    "muon": "bitlm_dist.training.optimizers.muon:Muon",
    "adamw": "bitlm_dist.training.optimizers.adamw:AdamW",
}
# Names that `head.engine` may have, with what shards the head; `replicated` shards nothing.
HEAD_PARTITIONERS = {
    "deepspeed": "bitlm_dist.training.partitioners.deepspeed:DeepSpeedPartitioner",
    "fsdp2": "bitlm_dist.training.partitioners.fsdp2:FSDP2Partitioner",
}


def load_registered(table: Mapping[str, str], name: str) -> Any:
    """Import the class that has a name.

    Args:
        table: ``module:Class`` by name.
        name: a name in the table.
    """
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
