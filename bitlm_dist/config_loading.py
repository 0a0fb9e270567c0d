"""From files and command-line words to a checked :class:`~bitlm_dist.config.Config` that knows where each value came from."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.paths import HERE, escaped, seen_from
from bitlm_dist.paths import absolute as absolute_path
from bitlm_dist.yaml_files import Entry, kind_of, read_file, read_word

COMMAND_LINE = "command line"  # as the source of a value
CONFIGS = Path(__file__).parent / "configs"  # in an installed package
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parent.parent / "configs"  # in a checkout


class Loaded(NamedTuple):
    """A checked config and, for each dotted key that was set, what set it."""

    config: Config
    sources: dict[str, str]


def load(file: Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Merge field defaults, preset, YAML file and overrides, and check the result.

    Args:
        file: a YAML file, or the name of one that ships with the package (``quickstart``).
        overrides: command-line words, ``--a.b value`` or ``--a.b=value``.

    Raises:
        UserError: names key or file, and the remedy.
    """
    layers = [dict(_parse_overrides(overrides))]
    if file is not None:
        layers.insert(0, read_file(_find(file), Config))
    preset = next((layer["preset"].value for layer in reversed(layers) if "preset" in layer), "default")
    preset_file = CONFIGS / "presets" / f"{preset}.yaml"
    if preset != "default" and preset_file.is_file():
        found = read_file(preset_file, Config)
        layers.insert(0, {key: Entry(entry.value, f"preset {preset}") for key, entry in found.items()})
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        values.update({key: entry.value for key, entry in layer.items()})
        sources.update({key: entry.source for key, entry in layer.items()})
    _one_token_a_block(values, sources)
    return Loaded(build(values, sources), sources)


def _one_token_a_block(values: dict[str, Any], sources: dict[str, str]) -> None:
    """``model.output = softmax`` is the only switch to the baseline: a file's block size gives way to it."""
    if values.get("model.output") == "softmax" and sources.get("model.block_size") != COMMAND_LINE:
        values["model.block_size"], sources["model.block_size"] = 1, "model.output = softmax"


def build(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Config:
    """A checked config from dotted keys; raises :class:`UserError`."""
    sources = sources or {}
    for key in values:
        _check_key(key, sources.get(key, "config"))
    try:
        return Config.model_validate(nested(values)).check()
    except ValidationError as error:
        raise UserError(explain(error, sources)) from None


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    document: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        place = document
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return document


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested document."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_run(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run folder with overrides; raises :class:`UserError` where there is none."""
    file = folder / "config.yaml"
    if not file.is_file():
        where = f"{folder}{seen_from(folder)}"
        raise UserError(f"{where} is no run folder: it holds no config.yaml; train into it first with `bitlm train`")
    return load(file, overrides).config


def absolute(config: Config) -> Config:
    """The config with all its paths absolute, so that it means the same from any folder."""
    return Config.model_validate(_with_paths(config.model_dump(), absolute_path))


def to_yaml(config: Config, in_run_folder: bool = False) -> str:
    """The resolved config as YAML.

    Args:
        in_run_folder: for the run's own folder: all paths absolute, and those inside the folder relative to it, so that it can be
            read from anywhere and be moved. Otherwise paths stay as they are.
    """
    if in_run_folder:
        config = absolute(config)

    def text(path: Path) -> str:
        if not in_run_folder or not path.is_relative_to(config.run.dir):
            return escaped(path)
        return f"{HERE}/{escaped(path.relative_to(config.run.dir))}".removesuffix("/.")

    return yaml.safe_dump(_with_paths(config.model_dump(), text), sort_keys=False)


def paths_of(config: Config) -> list[Path]:
    """Every path in the config, absolute, but for the run folder."""
    found: list[Path] = []
    _with_paths(config.model_dump(exclude={"run"}), lambda path: found.append(absolute_path(path)))
    return found


def _with_paths(value: Any, change: Callable[[Path], Any]) -> Any:
    """A document with every path replaced."""
    if isinstance(value, dict):
        return {key: _with_paths(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_paths(inner, change) for inner in value]
    return change(value) if isinstance(value, Path) else value


def _find(file: Path) -> Path:
    for candidate in (file, CONFIGS / file.name, CONFIGS / f"{file.name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise UserError(f"config file {file}{seen_from(file)} does not exist; shipped with the package: {known}")


def _parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Entry]]:
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: overrides read `--section.key value`")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not remaining:
                raise UserError(f"--{key} lacks a value: write `--{key} VALUE`")
            text = remaining.pop(0)
        yield key, Entry(read_word(text, key, kind_of(Config, key)), COMMAND_LINE)


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key there is."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _check_key(key: str, source: str) -> None:
    known = list(keys())
    if key in known:
        return
    if any(name.startswith(f"{key}.") for name in known):
        raise UserError(f"{key} ({source}) is a section: set keys in it, such as {key}.{_first_in(key, known)}")
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, 1, 0.6) or [n for n in known if n.rpartition(".")[2] == last]
    hint = f"did you mean {near[0]}?" if near else "`bitlm train CONFIG --print-config` lists every key"
    raise UserError(f"unknown key {key} ({source}): {hint}")


def _first_in(section: str, known: Sequence[str]) -> str:
    return next(name for name in known if name.startswith(f"{section}."))[len(section) + 1 :]


def explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """The first of pydantic's complaints as one line that names the key and what set it."""
    first, *more = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    source = sources.get(key) or next((s for k, s in sources.items() if key.startswith(f"{k}.")), "config")
    rest = f" (and {len(more)} more)" if more else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{key} = {first['input']!r} ({source}): {message[0].lower()}{message[1:]}{rest}"
