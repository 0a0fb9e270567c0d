import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

SCRIPT = """
import sys
from pathlib import Path
from bitlm_dist.data.shards import DocumentShards
with DocumentShards(Path(sys.argv[1]), "train") as shards:
    assert len(shards.tokens(0)) == shards.document_lengths[0]
unwanted = ("torchvision", "transformers", "streaming.vision", "streaming.text")
print(*[name for name in unwanted if name in sys.modules])
"""


def test_reading_brings_neither_images_nor_language_models(prepared):
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(prepared)], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == []
