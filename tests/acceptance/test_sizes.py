from pathlib import Path

import pytest
import typer

from bitlm_dist.acceptance.sizes import CONFIG, RECIPES, SIZES
from bitlm_dist.cli import app
from bitlm_dist.config_loading import load_config
from bitlm_dist.parallel.layout import build_layout

BENCH = typer.main.get_command(app).commands["bench"].commands["attention"]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_every_run_has_a_valid_config(size):
    for recipe in RECIPES.values():
        config = load_config(Path(CONFIG), [*recipe, *size.model]).config
        assert size.tokens_per_step % config.data.sequence_length == 0

    for layout in size.layouts.values():
        config = load_config(Path(CONFIG), [*RECIPES["default"], *size.small, *layout]).config
        build_layout(config.parallel, 2, 1)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_options_of_the_bench_exist(size):
    BENCH.make_context("attention", list(size.attention_bench))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_kill_comes_between_two_checkpoints(size):
    num_steps, every, before_kill = size.compared_steps
    assert every < before_kill < num_steps
