import io
import re

import pytest
import torch
from rich.console import Console

from bitlm_dist.cli.text_output import BitWatcher

BITS = torch.tensor([[[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 0.2, -0.9], [0.0, 0.0, 0.0, 0.0]]])


@pytest.fixture
def watch():
    def make(width, num_known=0, **options):
        console = Console(file=io.StringIO(), width=width, **options)
        return BitWatcher(console, 4, is_sequential=True, num_known=num_known), console.file

    return make


def test_the_text_of_a_token_stands_under_its_bits(watch):
    watcher, output = watch(80)
    watcher.show_pass(1, BITS)
    watcher.show_block(["and", "\n", "wisdom"])
    assert output.getvalue() == ("\n  1  1011  01·0  ····\n     and   \\n    wis…\n")


def test_a_block_that_ended_says_so(watch):
    watcher, output = watch(80)
    watcher.show_pass(2, BITS)
    watcher.show_block(["a"])
    assert output.getvalue().splitlines()[-1].split() == ["a", "(en…"]


def test_rows_wider_than_the_terminal_are_broken_between_tokens(watch):
    watcher, output = watch(17)
    watcher.show_pass(1, BITS)
    watcher.show_block(["a", "b", "c"])
    assert output.getvalue().splitlines()[1:] == [
        "  1  1011  01·0",
        "     ····",
        "     a     b   ",
        "     c   ",
    ]


def test_tokens_of_the_prompt_are_underlined_in_the_first_block_alone(watch):
    watcher, output = watch(80, num_known=1, force_terminal=True, color_system="standard")
    for _ in range(2):
        watcher.show_pass(1, BITS)
        watcher.show_block(["a", "b", "c"])
    rows = [line for line in output.getvalue().split("\n") if line.strip()]
    is_underlined = [bool(re.search(r"\x1b\[([\d]+;)*4[;m]", row)) for row in rows]
    assert is_underlined == [True, True, False, False]
