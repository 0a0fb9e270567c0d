import json
import re

import pytest

from bitlm_dist.errors import UserError

ODE = ("--sampling.sampler", "ode", "--sampling.steps", 3)


def test_rows_of_bits_have_a_legend_and_the_text_of_each_block_below_them(trained_run, bitlm):
    words = ("generate", trained_run, "--prompt", "the light", "--blocks", 2)
    written = json.loads(bitlm(*words, "--json").stdout)["text"]

    legend = "a row per head pass, which writes one token (1 0, · not yet); prompt underlined"
    lines = bitlm(*words, "--watch").stdout.splitlines()
    assert lines[0] == legend
    rows = [line for line in lines if re.match(r" +\d  [01·]{9}  ", line)]
    assert len(rows) >= 4
    # The whole text stands once at the end, in one piece.
    assert f"the light{written}" in "\n".join(lines)

    legend = bitlm("generate", trained_run, "--blocks", 1, "--watch", *ODE).stdout.splitlines()[0]
    assert legend == "a row per head pass, in which bits settle (1 0, · open)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--watch", "--json"), "--watch and --json exclude each other"),
        (("--prompt", "a\udcff b"), "--prompt is no UTF-8 text: character 2 of it"),
    ],
)
def test_what_cannot_be_generated_is_one_line(words, message, trained_run, bitlm):
    with pytest.raises(UserError, match=message):
        bitlm("generate", trained_run, *words)


def test_a_prompt_beyond_the_trained_length_is_warned_of(trained_run, bitlm):
    result = bitlm("generate", trained_run, "--blocks", 1, "--prompt", "the light " * 40)
    assert re.search(r"^bitlm: warning: the prompt has \d+ tokens, .* of 32:", result.stderr)
    assert "warning" not in bitlm("generate", trained_run, "--blocks", 1).stderr
