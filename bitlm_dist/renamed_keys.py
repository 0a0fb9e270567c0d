"""Config keys that were renamed.

A user who writes an old key is told the new one. Files that `bitlm` itself wrote, such as the
config.yaml of a run folder, are translated, so that runs of earlier versions can be resumed.
"""

from pathlib import Path

# old name: new name, as of 0.2.0
RENAMED_KEYS = {
    "model.backbone.layers": "model.backbone.num_layers",
    "model.backbone.width": "model.backbone.hidden_size",
    "model.backbone.heads": "model.backbone.num_heads",
    "model.backbone.kv_heads": "model.backbone.num_kv_heads",
    "model.backbone.head_width": "model.backbone.head_dim",
    "model.backbone.ffn_width": "model.backbone.ffn_hidden_size",
    "model.backbone.rope_base": "model.backbone.rope_theta",
    "head.layers": "head.num_layers",
    "head.width": "head.hidden_size",
    "head.heads": "head.num_heads",
    "head.modulations": "head.num_adaln_layers",
    "head.group": "head.bits_per_group",
    "head.components": "head.num_mixture_components",
    "diffusion.time": "diffusion.time_distribution",
    "diffusion.draws": "diffusion.num_noise_samples",
    "diffusion.per_token": "diffusion.per_token_noise_prob",
    "diffusion.per_token_sigma": "diffusion.per_token_noise_sigma",
    "diffusion.next_token": "diffusion.next_token_loss_weight",
    "diffusion.chain": "diffusion.autoregressive_loss_weight",
    "distillation.draws": "distillation.num_samples",
    "model.tied": "model.tie_embeddings",
    "optimizer.matrices": "optimizer.matrix_optimizer",
    "optimizer.lr": "optimizer.adamw_lr",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.final_lr": "optimizer.min_lr_ratio",
    "evaluation.sequences": "evaluation.num_sequences",
    "evaluation.strata": "evaluation.num_noise_levels",
    "evaluation.averaged": "evaluation.use_ema",
    "evaluation.sampled_blocks": "evaluation.num_sampled_blocks",
    "parallel.microbatch": "parallel.micro_batch_size",
    "parallel.recompute": "parallel.activation_checkpointing",
}
# Name: why it is gone.
REMOVED_KEYS = {
    "optimizer.fused": "AdamW is torch's fused one everywhere",
}
# Files next to a config.yaml that `bitlm` wrote: in a run folder, an export, a launched job.
_WRITTEN_BESIDE = ("environment.json", "export.json", "settings.json")


def current_key(key: str) -> str:
    """The current name of a key."""
    return RENAMED_KEYS.get(key, key)


def renamed_message(key: str, source: str, new_key: str) -> str:
    """Tell a user what a renamed key is called now; ``source`` is where it was set."""
    return f"unknown key {key} ({source}): it was renamed to {new_key}"


def removed_message(key: str, source: str) -> str:
    """Tell a user why a key is gone; ``source`` is where it was set."""
    return f"unknown key {key} ({source}): it was removed: {REMOVED_KEYS[key]}"


def is_written_by_bitlm(file: Path) -> bool:
    """True if a config file was written by `bitlm` for a run, an export or a job."""
    return file.name == "config.yaml" and any(
        (file.parent / name).is_file() for name in _WRITTEN_BESIDE
    )
