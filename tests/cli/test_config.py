"""The generated pages of docs/ are up to date."""

from pathlib import Path

import typer.cli
import yaml
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.cli.config import key_references
from bitlm_dist.cli.console import console
from bitlm_dist.config import Config
from bitlm_dist.config_loading import all_keys, build_config, load_config

DOCS = Path(__file__).parents[2] / "docs"
REFRESH = "run `make docs` and commit the diff"


def test_the_page_of_config_keys_is_what_the_fields_say():
    result = CliRunner().invoke(app, ["config", "--docs"])
    assert result.exit_code == 0
    assert (DOCS / "config.md").read_text() == result.stdout, REFRESH


def test_the_page_of_commands_is_what_help_says():
    words = ["bitlm_dist.cli", "utils", "docs", "--name", "bitlm", "--title", "Command line"]
    result = CliRunner().invoke(typer.cli.app, words)
    assert result.exit_code == 0
    assert (DOCS / "cli.md").read_text().split() == result.stdout.split(), REFRESH


def test_the_reference_holds_every_key_and_its_values_load():
    references = list(key_references())
    assert [reference.key for reference in references] == list(all_keys())
    assert all(reference.help for reference in references)

    defaults = {r.key: yaml.safe_load(r.default) for r in references}
    assert build_config(defaults) == Config()
    paper = defaults | {r.key: yaml.safe_load(r.paper) for r in references if r.paper}
    expected = load_config(None, ["--preset", "paper"]).config
    assert build_config({**paper, "preset": "paper"}) == expected


def test_the_table_on_the_terminal_has_every_key(monkeypatch):
    monkeypatch.setattr(console, "_width", 300)
    result = CliRunner().invoke(app, ["config"])
    assert result.exit_code == 0
    for key in all_keys():
        assert f" {key} " in result.stdout, key
