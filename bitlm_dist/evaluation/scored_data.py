"""A fingerprint of the text that an evaluation scores."""

import hashlib

from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.strict_json import to_json

_LENGTH = 16  # hexadecimal digits; it tells texts apart, nobody forges it
# A full split is the same text however it is packed. Of a part, these decide which one it is.
_PACKING_KEYS = ("data.sequence_length", "data.packing", "model.block_size")


def data_fingerprint(dataset: PackedDataset, num_sequences: int) -> str:
    """Hash what decides which text is scored.

    Args:
        dataset: the split, read in stored order.
        num_sequences: how many of its sequences are scored; 0: all.
    """
    settings = dataset.fingerprint()
    identity = {name: settings[name] for name in ("data.index", "data.tokenizer")}
    if 0 < num_sequences < len(dataset):
        identity |= {name: settings[name] for name in _PACKING_KEYS}
        identity["num_sequences"] = num_sequences
    return hashlib.sha256(to_json(identity, sort_keys=True).encode()).hexdigest()[:_LENGTH]
