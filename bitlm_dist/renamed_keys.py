"""Config keys of earlier versions: those that were renamed, and those that were removed.

A user who writes an old key is told what became of it. Files that `bitlm` itself wrote, such as the
config.yaml of a run folder, are translated, so that runs of earlier versions can be resumed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitlm_dist.old_heads import HEAD_SWITCHES, head_of_switches

# Name: the next name. That one may have been renamed since, or removed.
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
    "head.engine": "parallel.head.engine",
    "head.zero_stage": "parallel.head.zero_stage",
    "head.offload": "parallel.head.offload",
}
# Name: why it is gone.
REMOVED_KEYS = {
    "model.block_places": "the head's lookahead does its work",
    "model.embedding_width": "a wider input MLP was no better",
    "model.backbone.rope_reset": "rotary positions are relative, so it changed only the rounding",
    "optimizer.fused": "AdamW is torch's fused one everywhere",
    "head.context_mix": "the head's lookahead replaced it",
    **dict.fromkeys(HEAD_SWITCHES, "head.kind names the head, and experiments/ablation has others"),
}
# Key and value: what became of it.
REMOVED_VALUES = {
    "preset = bare": "it was removed: use the row bare of experiments/ablation/ladder.yaml",
}
# Files next to a config.yaml that `bitlm` wrote: in a run folder, an export, a launched job.
_WRITTEN_BESIDE = ("environment.json", "export.json", "settings.json")


def last_name(key: str) -> str:
    """The last name that a key had, or has."""
    while key in RENAMED_KEYS:
        key = RENAMED_KEYS[key]
    return key


def with_current_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the dotted keys of a document that `bitlm` wrote; removed keys are dropped."""
    named = {last_name(key): value for key, value in values.items()}
    current = {key: value for key, value in named.items() if key not in REMOVED_KEYS}
    if not HEAD_SWITCHES.keys() & named.keys():
        return current
    current |= head_of_switches(named)
    if current["head.kind"] == "paper":
        # keys of other heads, which it never had a use for
        for key in ("head.bits_per_group", "head.num_mixture_components"):
            current.pop(key, None)
    return current


def old_key_message(key: str, source: str) -> str | None:
    """Tell a user what became of a key of an earlier version.

    Args:
        key: the key.
        source: where it was set.

    Returns:
        None if no version had such a key, or this one has.
    """
    name = last_name(key)
    if name in REMOVED_KEYS:
        return f"unknown key {key} ({source}): it was removed: {REMOVED_KEYS[name]}"
    return renamed_message(key, source, name) if name != key else None


def renamed_message(key: str, source: str, new_key: str) -> str:
    """Tell a user what a renamed key is called now; ``source`` is where it was set."""
    return f"unknown key {key} ({source}): it was renamed to {new_key}"


def is_written_by_bitlm(file: Path) -> bool:
    """True if a config file was written by `bitlm` for a run, an export or a job."""
    return file.name == "config.yaml" and any(
        (file.parent / name).is_file() for name in _WRITTEN_BESIDE
    )
