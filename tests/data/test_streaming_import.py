import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

SCRIPT = """
import sys
from pathlib import Path
from bitlm_dist.data.shards import Shards
with Shards(Path(sys.argv[1]), "train") as shards:
    assert len(shards.tokens(0)) == shards.lengths[0]
print(*[name for name in ("torchvision", "transformers", "streaming.vision", "streaming.text") if name in sys.modules])
"""


def test_reading_brings_neither_images_nor_language_models(prepared):
    answer = subprocess.run([sys.executable, "-c", SCRIPT, str(prepared)], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
