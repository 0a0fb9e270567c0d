"""The model that a config names."""

import torch

from bitlm_dist.codes import BitCodes, natural
from bitlm_dist.config import Config
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.model.softmax_lm import SoftmaxLM


def build_model(config: Config, codes: BitCodes, eos: int) -> LanguageModel:
    """``model.output`` decides.

    Args:
        config: checked.
        codes: of the vocabulary; a softmax reads only its size.
        eos: id that ends a document.
    """
    if config.model.output == "softmax":
        return SoftmaxLM(config, codes.vocabulary, eos)
    return BitLM(config, codes, eos)


def meta_model(config: Config, vocabulary: int, bits: int) -> LanguageModel:
    """The model on the meta device: shapes without memory, whatever its size."""
    with torch.device("meta"):
        return build_model(config, BitCodes(natural(vocabulary), bits), eos=0)
