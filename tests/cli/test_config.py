"""`bitlm config`, --print-config, and the pages of docs/ that are generated from them."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
import typer.cli
import yaml
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.cli.config import config_as_yaml, key_references
from bitlm_dist.cli.console import console
from bitlm_dist.config import Config
from bitlm_dist.config_loading import CONFIGS, all_keys, build_config, flatten, load_config
from bitlm_dist.errors import UserError

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
    paper = defaults | {r.key: yaml.safe_load(r.paper) for r in references if r.paper}
    expected = load_config(None, ["--preset", "paper"]).config
    for values, config in ((defaults, Config()), (paper | {"preset": "paper"}, expected)):
        # a head has no keys of other kinds
        keys = dict(flatten(config.model_dump()))
        assert build_config({key: values[key] for key in keys}) == config


def test_the_table_on_the_terminal_has_every_key(monkeypatch):
    monkeypatch.setattr(console, "_width", 300)
    result = CliRunner().invoke(app, ["config"])
    assert result.exit_code == 0
    for key in all_keys():
        assert f" {key} " in result.stdout, key


SOURCES = "[{path: /a, weight: [[0, 0.5], [9, 0.1]]}, {path: /b, weight: [[0, 0.5], [9, 0.9]]}]"
WORDS = [
    [],
    ["--run.dir", "/runs/a$$b", "--data.cache_limit", "3gb", "--optimizer.betas", "[0.9, 0.95]"],
    ["--preset", "paper", "--data.path", "/d", "--data.sources", SOURCES],
]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
@pytest.mark.parametrize("words", WORDS)
def test_a_printed_config_loads_to_the_same_one(name, words, tmp_path):
    loaded = load_config(Path(name), words)
    file = tmp_path / "printed.yaml"
    file.write_text(config_as_yaml(loaded))
    assert load_config(file).config == loaded.config


def test_a_printed_config_says_where_its_values_come_from():
    text = config_as_yaml(load_config(Path("quickstart"), ["--training.steps", "9"]))
    assert re.search(r"^  steps: 9  # command line$", text, re.MULTILINE)
    assert re.search(r"^  block_size: 4  # .*quickstart.yaml:\d+$", text, re.MULTILINE)
    assert re.search(r"^  cache: null$", text, re.MULTILINE)


def test_none_of_python_is_no_path():
    with pytest.raises(UserError, match=r"data.cache = None \(command line\): write null"):
        load_config(None, ["--data.cache", "None"])
    assert load_config(None, ["--data.cache", "'None'"]).config.data.cache == Path("None")
    assert load_config(None, ["--data.cache", "null"]).config.data.cache is None


def test_the_schema_for_editors_has_every_key():
    result = CliRunner().invoke(app, ["config", "--json-schema"])
    schema = json.loads(result.stdout)

    def keys(node, prefix=""):
        for kind in node.get("anyOf", ()):  # of a head
            yield from keys(kind, prefix)
        node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        for name, child in node.get("properties", {}).items():
            inner = list(keys(child, f"{prefix}{name}."))
            yield from inner or [f"{prefix}{name}"]

    assert list(dict.fromkeys(keys(schema))) == list(all_keys())


def test_the_first_words_of_a_newcomer():
    for words in (["-h"], ["--help"], ["bench", "train", "-h"]):
        assert "Usage: " in CliRunner().invoke(app, words).stdout
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"bitlm {metadata.version('bitlm-dist')}\n")


def test_the_shell_completes_commands():
    asked = {"_BITLM_COMPLETE": "complete_bash", "COMP_WORDS": "bitlm tr", "COMP_CWORD": "1"}
    result = CliRunner(env=asked).invoke(app, [], prog_name="bitlm")
    assert result.stdout.split() == ["train"]
