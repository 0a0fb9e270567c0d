"""Texts that the model writes on the way, which show what it has learned so far.

Each continues the beginning of a held-out document. Noise and prompts are the same at every step,
so that the texts of two steps can be compared.
"""

from functools import cached_property
from itertools import takewhile

from bitlm_dist.config import Config
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data_prep.tokenizer import TOKENIZER_DIR, Tokenizer
from bitlm_dist.inference.generate import generate_blocks
from bitlm_dist.model.language_model import LanguageModel

NUM_PROMPT_TOKENS = 16
NUM_NEW_TOKENS = 64
SEED = 0


class SampleText:
    """Writes the sample texts of one run.

    Args:
        config: the run's config; ``evaluation.num_samples`` is the number of texts.
    """

    def __init__(self, config: Config) -> None:
        assert config.data.path is not None
        self._config = config
        self._folder = config.data.path

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self._folder / TOKENIZER_DIR)

    @cached_property
    def _prompts(self) -> list[list[int]]:
        """Beginnings of held-out documents; empty ones if there are too few."""
        number = self._config.evaluation.num_samples
        prompts: list[list[int]] = []
        if read_manifest(self._folder)["splits"].get("validation", {}).get("documents"):
            dataset = PackedDataset.from_config(self._config, "validation")
            try:
                for index in range(len(dataset)):
                    tokens = dataset.sequence(index)[0].tolist()
                    prompts += _document_beginnings(
                        tokens, self._tokenizer.bos, self._tokenizer.eos
                    )
                    if len(prompts) >= number:
                        break
            finally:
                dataset.close()
        return (prompts + [[]] * number)[:number]

    def write(self, model: LanguageModel) -> list[dict[str, str]]:
        """Have the model write its texts.

        Returns:
            The ``prompt`` and the ``text`` that continues it, of each.
        """
        tokenizer = self._tokenizer
        samples = []
        for number, prompt in enumerate(self._prompts):
            new: list[int] = []
            for tokens in generate_blocks(
                model,
                prompt,
                bos=tokenizer.bos,
                num_blocks=-(-NUM_NEW_TOKENS // model.block_size),
                sampling=self._config.sampling,
                seed=SEED + number,
                use_cache=False,  # which a model of several data-parallel ranks cannot have
            ):
                new += tokens
            samples.append(
                {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode_after(prompt, new)}
            )
        return samples


def _document_beginnings(tokens: list[int], bos: int, eos: int) -> list[list[int]]:
    """The first tokens of each document that begins in a packed sequence."""
    beginnings = []
    for position in range(1, len(tokens)):
        if tokens[position - 1] == bos and tokens[position] not in (bos, eos):
            following = tokens[position : position + NUM_PROMPT_TOKENS]
            beginnings.append([*takewhile(lambda token: token not in (bos, eos), following)])
    return beginnings
