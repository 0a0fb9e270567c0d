"""Classes by name, as `module:Class`: only those that a run uses are imported."""

# Update rules, by the names that `optimizer.matrix_optimizer` may have.
OPTIMIZERS = {
    "muon": "bitlm_dist.training.optimizers.muon:Muon",
    "adamw": "bitlm_dist.training.optimizers.adamw:AdamW",
}
# Partitioners of the head, by the names of `parallel.head.engine`; `replicated` has none.
HEAD_PARTITIONERS = {
    "deepspeed": "bitlm_dist.training.partitioners.deepspeed:DeepSpeedPartitioner",
    "fsdp2": "bitlm_dist.training.partitioners.fsdp2:FSDP2Partitioner",
}
