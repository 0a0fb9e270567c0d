"""Load and check a :class:`~bitlm_dist.config.Config` and record where each value came from."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from bitlm_dist.config import Config
from bitlm_dist.config_section import Section
from bitlm_dist.errors import UserError
from bitlm_dist.paths import HERE_VARIABLE, absolute_path, escape_path, relative_to_note
from bitlm_dist.renamed_keys import (
    REMOVED_VALUES,
    is_written_by_bitlm,
    last_name,
    old_key_message,
    with_current_keys,
)
from bitlm_dist.yaml_files import (
    SourcedValue,
    annotation_of,
    model_classes,
    parse_override,
    read_yaml_file,
)

Mark = TypeVar("Mark")
COMMAND_LINE = "command line"  # the source of a value
CONFIGS = Path(__file__).parent / "configs"  # in an installed package
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parent.parent / "configs"  # in a checkout


class LoadedConfig(NamedTuple):
    """A checked config, and the source of each dotted key that was set."""

    config: Config
    sources: dict[str, str]


def load_config(file: Path | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Merge field defaults, preset, YAML file and overrides, and check the result.

    Args:
        file: a YAML file, or the name of one that ships with the package (``quickstart``).
        overrides: command-line words, ``--a.b value`` or ``--a.b=value``.

    Raises:
        UserError: a value or file is invalid; names it and the remedy.
    """
    # layers in ascending order of precedence
    layers = [dict(_parse_overrides(overrides))]
    if file is not None:
        file = _find_config_file(file)
        file_values = read_yaml_file(file, Config)
        if is_written_by_bitlm(file):
            file_values = _in_current_keys(file_values, str(file))
        layers.insert(0, file_values)

    # The file or the command line may choose the preset, which goes below both.
    preset = next(
        (layer["preset"].value for layer in reversed(layers) if "preset" in layer), "default"
    )
    preset_file = CONFIGS / "presets" / f"{preset}.yaml"
    if preset != "default" and preset_file.is_file():
        preset_values = read_yaml_file(preset_file, Config)
        layers.insert(
            0,
            {
                key: SourcedValue(entry.value, f"preset {preset}")
                for key, entry in preset_values.items()
            },
        )

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        values.update({key: entry.value for key, entry in layer.items()})
        sources.update({key: entry.source for key, entry in layer.items()})

    _set_softmax_block_size(values, sources)
    return LoadedConfig(build_config(values, sources), sources)


def _in_current_keys(values: Mapping[str, SourcedValue], file: str) -> dict[str, SourcedValue]:
    """Translate the keys of a file that `bitlm` wrote."""
    current = with_current_keys({key: entry.value for key, entry in values.items()})
    sources = {last_name(key): entry.source for key, entry in values.items()}
    return {key: SourcedValue(value, sources.get(key, file)) for key, value in current.items()}


def _set_softmax_block_size(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Set the block size of the baseline to 1, so that ``model.output = softmax`` alone selects it.

    Only a block size from the command line remains, to be refused by the check.
    """
    if values.get("model.output") == "softmax" and sources.get("model.block_size") != COMMAND_LINE:
        values["model.block_size"] = 1
        sources["model.block_size"] = "model.output = softmax"


def build_config(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Config:
    """Build and check a config from dotted keys.

    Args:
        values: value of each key; the others have their defaults.
        sources: where each value was set, for messages.

    Raises:
        UserError: a key or value is invalid.
    """
    sources = sources or {}
    for key in values:
        _check_key(key, sources.get(key, "config"))

    try:
        return Config.model_validate(unflatten(values)).check()
    except ValidationError as error:
        raise UserError(format_validation_error(error, sources)) from None


def unflatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nest a document of dotted keys; the inverse of :func:`flatten`."""
    document: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        section = document
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return document


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of a nested document."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def load_run_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the config of a run folder.

    Args:
        folder: the run folder.
        overrides: command-line words, as in :func:`load_config`.

    Raises:
        UserError: the folder has no config, or a value is invalid.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        where = f"{folder}{relative_to_note(folder)}"
        run = folder.absolute().parent.parent
        if folder.absolute().parent.name == "checkpoints" and (run / "config.yaml").is_file():
            raise UserError(
                f"{folder} is no run folder but a checkpoint in one: "
                f"name {folder.parent.parent}, whose latest checkpoint is used"
            )
        raise UserError(
            f"{where} is no run folder: it holds no config.yaml; "
            "train into it first with `bitlm train`"
        )
    return load_config(file, overrides).config


def with_absolute_paths(config: Config) -> Config:
    """Make all paths of a config absolute, so that it does not depend on the current folder."""
    return Config.model_validate(map_paths(config.model_dump(), absolute_path))


def to_yaml(config: Config, in_run_folder: bool = False) -> str:
    """Serialize a config to YAML.

    Args:
        config: the config, every field of which is written.
        in_run_folder: write paths inside the run folder relative to it and all others absolute, so
            that the folder can be read from anywhere and be moved. If False, keep all paths.
    """
    if in_run_folder:
        config = with_absolute_paths(config)

    def text(path: Path) -> str:
        """The text that is read back as this path."""
        if not in_run_folder or not path.is_relative_to(config.run.dir):
            return escape_path(path)
        # the run folder itself is "." relative to it
        return f"{HERE_VARIABLE}/{escape_path(path.relative_to(config.run.dir))}".removesuffix("/.")

    return yaml.safe_dump(map_paths(config.model_dump(), text), sort_keys=False)


def config_paths(config: Config) -> list[Path]:
    """Absolute paths that the config refers to, except the run folder."""
    paths: list[Path] = []
    map_paths(config.model_dump(exclude={"run"}), lambda path: paths.append(absolute_path(path)))
    return paths


def map_paths(value: Any, change: Callable[[Path], Any]) -> Any:
    """Copy a document, replacing every path by ``change(path)`` and every tuple by a list."""
    if isinstance(value, dict):
        return {key: map_paths(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [map_paths(inner, change) for inner in value]
    return change(value) if isinstance(value, Path) else value


def _find_config_file(file: Path) -> Path:
    """Look for a config file, then for a shipped one of that name."""
    for candidate in (file, CONFIGS / file.name, CONFIGS / f"{file.name}.yaml"):
        if candidate.is_file():
            return candidate

    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    problem = "is a folder" if file.is_dir() else "does not exist"
    raise UserError(
        f"config file {file}{relative_to_note(file)} {problem}; shipped with the package: {shipped}"
    )


def _parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, SourcedValue]]:
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: overrides read `--section.key value`")

        key, equals, text = word[2:].partition("=")
        if not equals:
            if not remaining:
                raise UserError(f"--{key} lacks a value: write `--{key} VALUE`")
            # a value may begin with dashes
            text = remaining.pop(0)

        yield key, SourcedValue(parse_override(text, key, annotation_of(Config, key)), COMMAND_LINE)


def override_keys(words: Sequence[str]) -> list[str]:
    """The dotted keys that command-line words set, known or not."""
    return [key for key, _ in _parse_overrides(words)]


class KeyField(NamedTuple):
    """A dotted key with its field, and its marks: those of the field, then those of the section."""

    key: str
    field: FieldInfo
    marks: tuple[Any, ...]


def all_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[KeyField]:
    """Yield every key, in the order of the fields."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = [each for each in model_classes(field.annotation) if issubclass(each, Section)]
        if not inner:
            yield KeyField(key, field, (*field.metadata, *section.marks))
            continue

        # Of a union, every key once, with all its types.
        fields: dict[str, KeyField] = {}
        for found in chain.from_iterable(all_fields(each, f"{key}.") for each in inner):
            first = fields.setdefault(found.key, found)
            if first.field.annotation != found.field.annotation:
                merged = copy(first.field)
                merged.annotation = Union[first.field.annotation, found.field.annotation]  # type: ignore[assignment]  # noqa: UP007
                fields[found.key] = first._replace(field=merged)
        yield from fields.values()


def all_keys() -> Iterator[str]:
    """Yield every dotted key, in the order of the fields."""
    return (field.key for field in all_fields())


@cache
def marks_of_keys(kind: type[Mark]) -> dict[str, Mark]:
    """The mark of this kind of every key that bears one; the field's own precedes the section's."""
    return {
        key: next(mark for mark in marks if isinstance(mark, kind))
        for key, _, marks in all_fields()
        if any(isinstance(mark, kind) for mark in marks)
    }


def _check_key(key: str, source: str) -> None:
    """Refuse an unknown key with the best hint there is."""
    valid_keys = list(all_keys())
    if key in valid_keys:
        return

    if message := old_key_message(key, source):
        raise UserError(message)
    if any(name.startswith(f"{key}.") for name in valid_keys):
        raise UserError(
            f"{key} ({source}) is a section: set keys in it, "
            f"such as {key}.{_first_key_in(key, valid_keys)}"
        )

    # a similar key, else one with the same last name in another section
    last = key.rpartition(".")[2]
    close_matches = difflib.get_close_matches(key, valid_keys, 1, 0.6) or [
        n for n in valid_keys if n.rpartition(".")[2] == last
    ]
    hint = (
        f"did you mean {close_matches[0]}?"
        if close_matches
        else "`bitlm train CONFIG --print-config` lists every key"
    )
    raise UserError(f"unknown key {key} ({source}): {hint}")


def _first_key_in(section: str, valid_keys: Sequence[str]) -> str:
    return next(name for name in valid_keys if name.startswith(f"{section}."))[len(section) + 1 :]


# What is expected, by the type of pydantic's error, where its own words are those of Python.
_EXPECTED = {
    "path_type": "expected a path",
    "int_parsing": "expected an integer",
    "int_type": "expected an integer",
    "int_from_float": "expected an integer",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "model_type": "expected keys and values",
    "dict_type": "expected keys and values",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
}

_PHRASES = {
    "Input should be greater than or equal to": "expected at least",
    "Input should be less than or equal to": "expected at most",
    "Input should be greater than": "expected more than",
    "Input should be": "expected",
}


def format_validation_error(error: ValidationError, sources: Mapping[str, str]) -> str:
    """Format pydantic's first error as one line that names the key and where it was set."""
    first, *more = error.errors()
    key, value, message = _explain(first)

    # an item of a list has the source of the list
    source = sources.get(key) or next(
        (s for k, s in sources.items() if key.startswith(f"{k}.")), "config"
    )

    setting = f"{key} = {value_as_yaml(value)}"
    message = REMOVED_VALUES.get(setting, message)
    rest = f" (and {len(more)} more)" if more else ""
    return f"{setting} ({source}): {message}{rest}"


def _explain(error: Mapping[str, Any]) -> tuple[str, Any, str]:
    """The key of one of pydantic's errors, its value, and what is wrong with it."""
    location = [str(part) for part in error["loc"]]
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        *kinds, last = context["expected_tags"].split(", ")
        # pydantic's own tag is the text of the value
        return "head.kind", error["input"]["kind"], f"expected {', '.join(kinds)} or {last}"

    # pydantic names the kind of head between the section and its key
    if location[0] == "head" and len(location) > 2:
        _, kind, key = location
        location = ["head", key]
        if error["type"] == "extra_forbidden":
            return ".".join(location), error["input"], f"head.kind = {kind} has no such key"

    message = error["msg"].removeprefix("Value error, ")
    for theirs, ours in _PHRASES.items():
        message = message.replace(theirs, ours)
    message = _EXPECTED.get(error["type"], f"{message[0].lower()}{message[1:]}")
    return ".".join(location), error["input"], message


def value_as_yaml(value: Any) -> str:
    """Format a value as it is written in YAML, on one line."""
    document = map_paths(value, str)
    text = yaml.safe_dump(document, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
