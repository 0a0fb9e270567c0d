"""The command `bitlm config`: a reference of all config keys, made from their fields."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bitlm_dist.cli.console import print_table
from bitlm_dist.config import Config
from bitlm_dist.config_loading import (
    LoadedConfig,
    all_fields,
    flatten,
    load_config,
    map_paths,
    marks_of_keys,
    value_as_yaml,
)
from bitlm_dist.config_section import AllowedBy, Resume, Trained
from bitlm_dist.errors import UserError
from bitlm_dist.paths import escape_path
from bitlm_dist.strict_json import to_json

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
INTRODUCTION = """# Config keys

Every key of a config, as `bitlm config --docs` prints them. A YAML file nests them (`model:` →
`block_size: 4`) or spells them with dots; the command line takes `--model.block_size 4`. The field
defaults are the preset `default`; *paper* is the value of `preset: paper` where it differs.

*may change* says who may set a key of a run that has begun. *resume*: the resumed run; *resume,
longer*: that too, if `optimizer.schedule` is `constant`; *resume with* a key: if that one is true.
*eval*: `bitlm eval` and `bitlm generate`. A key without any of them stays as it is.
"""


class KeyReference(NamedTuple):
    """One row of the reference."""

    key: str
    type: str
    default: str
    paper: str
    may_change: str
    help: str


def config_command(
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="List only keys that begin so: optimizer.")
    ] = "",
    docs: Annotated[
        bool, typer.Option("--docs", help="Print docs/config.md instead of a table.")
    ] = False,
    json_schema: Annotated[
        bool,
        typer.Option("--json-schema", help="Print a JSON schema, by which editors check YAML."),
    ] = False,
) -> None:
    """List every config key with its default and help text.

    `bitlm train CONFIG --print-config` prints the values of one config, as YAML.
    """
    if json_schema:
        schema = Config.model_json_schema()
        # head.kind has a default, and keys that all heads have are valid for each of them
        head = schema["properties"]["head"]
        head["anyOf"] = head.pop("oneOf")
        print(to_json({"$schema": SCHEMA_DIALECT} | schema, indent=1))
        return

    references = [r for r in key_references() if r.key.startswith(prefix)]
    if not references:
        raise UserError(f"no key begins with {prefix}: `bitlm config` lists them all")
    if docs:
        print(markdown(references))
        return

    rows = ((r.key, r.default, r.help) for r in references)
    print_table("", ("key", "default", "help"), rows)


def config_as_yaml(loaded: LoadedConfig) -> str:
    """Format a config as YAML that loads to the same config.

    A comment says where each value was set; those without one are defaults.
    """
    values = map_paths(loaded.config.model_dump(), escape_path)
    lines: list[str] = []
    section: list[str] = []
    for key, value in flatten(values):
        *parents, name = key.split(".")
        shared = 0
        while shared < min(len(parents), len(section)) and parents[shared] == section[shared]:
            shared += 1
        for depth in range(shared, len(parents)):
            lines.append("  " * depth + f"{parents[depth]}:")
        section = parents

        source = loaded.sources.get(key)
        comment = f"  # {source}" if source else ""
        lines.append("  " * len(parents) + f"{name}: {value_as_yaml(value)}{comment}")
    return "\n".join(lines)


def key_references() -> Iterator[KeyReference]:
    """Yield every key in the order of the fields."""
    paper = dict(flatten(load_config(None, ["--preset", "paper"]).config.model_dump(mode="json")))
    for key, field, _ in all_fields():
        default = value_as_yaml(field.get_default(call_default_factory=True))
        paper_value = value_as_yaml(paper[key]) if key in paper else default
        help_text = " ".join((field.description or "").split())
        differs = paper_value != default and key != "preset"
        yield KeyReference(
            key,
            _type_text(field),
            default,
            paper_value if differs else "",
            _may_change_text(key),
            help_text,
        )


def markdown(references: list[KeyReference]) -> str:
    """Format docs/config.md: one table per section."""
    lines = [INTRODUCTION]
    section = ""
    for reference in references:
        name, _, key = reference.key.rpartition(".")
        if name != section or len(lines) == 1:
            section = name
            title = f"## {section}" if section else "## Top level"
            lines += ["", title, "", "| key | type | default | paper | may change | |"]
            lines.append("|---|---|---|---|---|---|")
        cells = (
            f"`{key}`",
            reference.type,
            f"`{reference.default}`",
            f"`{reference.paper}`" if reference.paper else "",
            reference.may_change,
            reference.help,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")

    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _may_change_text(key: str) -> str:
    """Say who may set a key of a run that has begun, as its marks tell."""
    changes: list[str] = []
    if mark := marks_of_keys(Resume).get(key):
        changes.append("resume" if mark is Resume.FREE else "resume, longer")
    if allowed_by := marks_of_keys(AllowedBy).get(key):
        changes.append(f"resume with `{allowed_by.key}`")
    if marks_of_keys(Trained).get(key) is Trained.FREE:
        changes.append("eval")
    return ", ".join(changes)


def _type_text(field: FieldInfo) -> str:
    """Describe the type of a field in the words of a YAML file, with its limits."""
    text = _annotation_text(field.annotation)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {getattr(mark, name):g}"
        for mark in field.metadata
        for name, sign in signs.items()
        if getattr(mark, name, None) is not None
    ]
    return f"{text}, {', '.join(limits)}" if limits else text


def _annotation_text(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin is Annotated:
        return _annotation_text(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        inner = [_annotation_text(a) for a in get_args(annotation) if a is not types.NoneType]
        optional = types.NoneType in get_args(annotation)
        if all(get_origin(a) is Literal for a in get_args(annotation)):
            return ", ".join(inner)
        return " or ".join([*inner, "null"] if optional else inner)
    if origin is tuple:
        first, *rest = get_args(annotation)
        if rest == [...]:
            return f"list of {_annotation_text(first)}"
        return f"[{', '.join(_annotation_text(a) for a in (first, *rest))}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"

    names = {str: "text", bool: "true or false", int: "integer", float: "number", Path: "path"}
    return names[annotation]
