"""Commands in README and docs: each one exists with its options, and a clean clone can run it.

A block of commands is fenced as ``sh``, and runs as it stands, or as ``sh MARK``, where it needs:

=========  ==================================================
cluster    Slurm, or several machines
gpu        a GPU
network    files from elsewhere
minutes    minutes on two cores
recipe     the changes that its page describes
synopsis   names in place of the capitals; never run
=========  ==================================================
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import zstandard
from pages import BLOCK, INLINE_CODE, PAGES, ROOT, name_of, run_folder_tables

from bitlm_dist.cli import app
from bitlm_dist.config_loading import all_keys, load_config

# docs/cli.md is generated from the commands themselves.
COMMAND_PAGES = [page for page in PAGES if page.name != "cli.md"]
MARKS = {"cluster", "gpu", "network", "minutes", "recipe", "synopsis"}
LANGUAGES = {"sh", "python", "yaml", "text", "mermaid"}
PROGRAMS = ("bitlm", "python", "pytest", "make", "torchrun", "bash", "source", "touch")

COMMAND = re.compile(r"(?:\bbitlm|-m bitlm_dist) +(?P<words>.*)")
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w.-]*")
AT_PROMPT = re.compile(rf"^(?:{'|'.join(PROGRAMS)}) ", re.MULTILINE)
TARGET = re.compile(r"(?:^|[;&] *)make +([a-z-]+)(?=$| +[A-Z]+=| *[#;&])")
FILE = re.compile(r"(?:pytest|python|bash)\b.*? ((?:tests|docs|\.ci)/[\w./-]+)")
NAME = re.compile(r"(?:--)?(?P<key>[a-z]\w*(?:\.\w+)+)(?=$|[ :=])")  # of a config key, or of a file
FILES = (".py", ".lock", ".safetensors", ".json")
HELP = {"--help", "-h"}

KEYS = set(all_keys())
PREFIXES = {key.rsplit(".", dots)[0] for key in KEYS for dots in (1, 2)}  # of sections
BITLM = typer.main.get_command(app)
CONFIGS = {file.stem for file in (ROOT / "configs").glob("*.yaml")}

# All that the test takes from the commands so as to be done in a minute, by subcommand. The words
# are appended to those of the docs, so these are read as well.
SHORTER = {
    "train": "--training.steps 2 --evaluation.num_sequences 2 --evaluation.num_sampled_blocks 4",
    "eval": "--evaluation.num_sequences 2 --evaluation.num_sampled_blocks 4",
}
# Stands for the program that `make setup` installs in .venv/bin: the clone's own code, run by the
# interpreter of the tests.
PROGRAM = """#!/bin/bash
export PYTHONPATH={clone}
case "$1" in {cases}
esac
exec {python} -m bitlm_dist "$@"
"""
# Rows of docs/run-folder.md for other runs: with several sources, launched, stopped, at W&B.
ELSEWHERE = {
    "Files": {"launch/", "stop", "wandb.json"},
    "metrics.jsonl": {"sequences/NAME"},
}
TEXT_BYTES = 200_000  # of the user's own text, as small as README speaks of


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def is_runnable(self) -> bool:
        return self.info == "sh"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["info"], match["text"])


def command_lines(page: Path) -> Iterator[str]:
    """The lines of all shell blocks, and code between backticks that is a command."""
    for block in blocks(page):
        # what a recipe runs exists only after its changes
        if block.info.startswith("sh") and block.info != "sh recipe":
            yield from block.text.replace("\\\n", " ").splitlines()
    prose = BLOCK.sub("", page.read_text())
    yield from (code for code in INLINE_CODE.findall(prose) if code.split(" ")[0] in PROGRAMS)


def commands_named(words: list[str]) -> list:
    """The commands that words of a line name; ``train|generate`` names two."""
    found = [BITLM]
    for word in words:
        if not all(hasattr(command, "commands") for command in found):
            break
        names = word.split("|")
        if not all(re.fullmatch(r"[a-z][a-z-]*", name) for name in names):
            break
        found = [command.commands[name] for command in found for name in names]
    return found


def line_problems(line: str) -> Iterator[str]:
    """What is wrong with a line of commands."""
    makefile = (ROOT / "Makefile").read_text()
    for target in TARGET.findall(line):
        if not re.search(rf"^{target}:", makefile, re.MULTILINE):
            yield f"there is no make {target}"
    for file in FILE.findall(line):
        if not (ROOT / file).exists():
            yield f"there is no {file}"

    for part in re.split(r" (?:&&|\|\||\|) |; ", line):
        match = COMMAND.search(part)
        if match is None:
            continue
        words = re.findall(r"[^\s\"'\[\](){}]+", match["words"])
        try:
            commands = commands_named(words)
        except KeyError as error:
            yield f"there is no command {error} in `{part.strip()}`"
            continue

        for command in commands:
            yield from option_problems(command, match["words"])
        if words[:1] == ["train"] and CONFIGS & set(words) and "…" not in words:
            yield from override_problems(words[1:])


def keys_named(page: Path) -> set[str]:
    """Config keys that the prose of a page names."""
    matches = (NAME.match(code) for code in INLINE_CODE.findall(BLOCK.sub("", page.read_text())))
    names = {match["key"] for match in matches if match is not None}
    return {n for n in names if n.split(".")[0] in PREFIXES and not n.endswith(FILES)}


def option_problems(command, words: str) -> Iterator[str]:
    known = HELP | {option for parameter in command.params for option in parameter.opts}
    takes_keys = command.context_settings.get("ignore_unknown_options", False)

    for option in OPTION.findall(words):
        is_key = takes_keys and option.removeprefix("--") in KEYS
        if option not in known and not is_key:
            yield f"{command.name} has no option {option}"


def override_problems(words: list[str]) -> Iterator[str]:
    """Load the config of `bitlm train`, as far as the values are no names in capitals."""
    config = next(word for word in words if word in CONFIGS)
    pairs = itertools.pairwise(words)
    overrides = [
        word
        for key, value in pairs
        if key.removeprefix("--") in KEYS and not re.fullmatch(r"[A-Z]+", value)
        for word in (key, value)
    ]
    try:
        load_config(Path(config), overrides)
    except ValueError as error:
        yield str(error)


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=name_of)
def test_commands_exist_and_blocks_are_marked(page):
    problems = []
    for block in blocks(page):
        language, *marks = block.info.split() or [""]
        if language not in LANGUAGES or not MARKS.issuperset(marks) or (marks and language != "sh"):
            problems.append(f"line {block.line}: ```{block.info} is no language, or no mark")
        if language == "text" and AT_PROMPT.search(block.text):
            problems.append(f"line {block.line}: commands in a block of text")

    for line in command_lines(page):
        problems += line_problems(line)
    problems += [f"there is no key {key}" for key in keys_named(page) - PREFIXES - KEYS]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bitlm trian quickstart", "no command 'trian'"),
        ("bitlm bench train|nosuch CONFIG", "no command 'nosuch'"),
        ("bitlm eval RUN --jsn", "eval has no option --jsn"),
        ("bitlm prep x --training.steps 2", "prep has no option --training.steps"),
        ("bitlm train quickstart --training.steps two", "training.steps = two"),
        ("torchrun -m bitlm_dist train CONFIG --model.blocksize 2", "no option --model.blocksize"),
        ("make tset", "no make tset"),
        ("python -m pytest tests/test_nosuch.py", "no tests/test_nosuch.py"),
    ],
)
def test_a_wrong_command_is_found(line, words):
    assert words in "\n".join(line_problems(line))
    assert not list(line_problems("bitlm eval RUN --json --sampling.steps 4  # and --split NAME"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the tracked files, set up without pip, with a text of the user's own."""
    folder = tmp_path_factory.mktemp("clone")
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, tracked.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)

    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    cases = "".join(f'\n{name}) set -- "$@" {words} ;;' for name, words in SHORTER.items())
    (programs / "bitlm").write_text(
        PROGRAM.format(clone=folder, cases=cases, python=sys.executable)
    )
    (programs / "bitlm").chmod(0o755)
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    (folder / ".venv" / ".installed").touch()

    sample = ROOT / "data_prep" / "sample" / "kjv.jsonl.zst"
    with zstandard.open(sample, "rt") as lines:
        text = "\n".join(json.loads(line)["text"] for line in itertools.islice(lines, 100))
    (folder / "my.txt").write_text(text[:TEXT_BYTES])
    return folder


@pytest.fixture(scope="module")
def failed(clone):
    """What came of the first block that failed; empty if all ran, in order and in one folder."""
    environment = {**os.environ, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}"}
    for block in (block for page in COMMAND_PAGES for block in blocks(page) if block.is_runnable):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            where = f"{name_of(block.page)}:{block.line}: exit code {done.returncode}"
            return "\n".join((where, block.text, done.stdout, done.stderr))
    return ""


@pytest.mark.slow
@pytest.mark.integration
def test_a_clean_clone_runs_every_block(failed):
    assert not failed, failed
    num_run = sum(block.is_runnable for page in COMMAND_PAGES for block in blocks(page))
    assert num_run >= 5, "the pattern finds no blocks any more"


@pytest.mark.slow
@pytest.mark.integration
def test_the_page_of_the_run_folder_has_all_of_a_run(clone, failed):
    assert not failed
    run = clone / "runs" / "mine"
    lines = {
        file.name: [json.loads(line) for line in file.read_text().splitlines()]
        for file in run.glob("*.jsonl")
    }
    found = {name: set().union(*records) for name, records in lines.items()}
    found["evaluations.jsonl"] |= lines["evaluations.jsonl"][-1]["validation"].keys()
    found["Files"] = {f"{file.name}/" if file.is_dir() else file.name for file in run.iterdir()}

    for heading, documented in run_folder_tables().items():
        if heading != "launch/":
            assert found[heading] <= documented, f"{heading}: what has no row"
            # rows of what this run does not have
            assert documented - found[heading] <= ELSEWHERE.get(heading, set()), heading
