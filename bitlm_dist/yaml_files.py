"""YAML read for the fields that it fills, so that it means what its writer means.

YAML 1.1 takes 0100 for 64, 1:30 for 90, ``on`` for a boolean and 2024-01-01 for a date, and of two equal keys it keeps the last.
Here a field that takes text gets the text as it stands and a path is expanded. A key that stands twice and a number that YAML
reads in another base are refused, with file and line.
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from bitlm_dist.errors import UserError
from bitlm_dist.paths import expanded

EXPANDED = "expanded"  # in Annotated[str, EXPANDED]: text that is a path for some programs
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_NULL = "tag:yaml.org,2002:null"
_NULLS = ("", "~", "null", "Null", "NULL")


class Entry(NamedTuple):
    """A value with the place that set it, such as ``run.yaml:3``."""

    value: Any
    source: str


def read_file(file: Path, model: type[BaseModel]) -> dict[str, Entry]:
    """Read a YAML file as values by dotted key.

    Args:
        file: holds `key: value` lines, nested or with dotted keys; may be empty.
        model: whose fields say how a value is read. Unknown keys are kept, for the caller to refuse.

    Raises:
        UserError: no valid YAML, a key or section stands twice, or a value is ambiguous; names file and line.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is None:
            return {}
        if not isinstance(root, MappingNode):
            found = type(_constructed(root)).__name__
            raise UserError(f"{file} must hold `key: value` lines, found a {found}")
        return _Reader(str(file), file.parent).entries(root, model)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{file}: an anchor refers to itself: write the value out") from None


def read_word(text: str, key: str, kind: Any) -> Any:
    """Read a value from the command line.

    Args:
        text: a word; what is quoted as in YAML loses the quotes.
        key: that it sets.
        kind: annotation of the key's field; Any: unknown.

    Raises:
        UserError: it is ambiguous; names the key.
    """
    as_it_is = ScalarNode("tag:yaml.org,2002:str", text)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader) or ScalarNode(_NULL, "")
    except yaml.YAMLError:
        node = as_it_is
    quoted = isinstance(node, ScalarNode) and node.style in ("'", '"')
    if _takes_text(kind) and not quoted and text not in _NULLS:
        node = as_it_is  # `a: b`, `[x]` and `a #b` are names of files
    return _Reader("", None).value(node, kind, key)


def kind_of(model: type[BaseModel], key: str) -> Any:
    """The annotation of a dotted key's field; Any where there is none."""
    kind: Any = model
    for name in key.split("."):
        section = _section(kind)
        if section is None or name not in section.model_fields:
            return Any
        kind = _kind(section, name)
    return kind


class _Reader:
    """Reads the nodes of one document.

    Args:
        file: for messages; empty: the command line.
        here: folder of the file.
    """

    def __init__(self, file: str, here: Path | None) -> None:
        self._file, self._here = file, here

    def entries(self, root: MappingNode, model: type[BaseModel]) -> dict[str, Entry]:
        """Values by dotted key."""
        found: dict[str, Entry] = {}
        seen: dict[str, Node] = {}
        for key, at, node, kind in self._leaves(root, model, "", seen):
            found[key] = Entry(self.value(node, kind, key), self._at(at))
        for key in found:
            for prefix in _prefixes(key):
                if prefix in found:
                    raise self._twice(prefix, seen[prefix], seen[key])
        return found

    def _leaves(self, node: MappingNode, kind: Any, prefix: str, seen: dict[str, Node]) -> Iterator[tuple[str, Node, Node, Any]]:
        for name, at, child in self._pairs(node, prefix):
            key = f"{prefix}{name}"
            if key in seen:
                raise self._twice(key, seen[key], at)
            seen[key] = at
            inner = kind_of(kind, name) if _section(kind) else Any
            if isinstance(child, MappingNode) and (inner is Any or _section(inner)):
                yield from self._leaves(child, _section(inner), f"{key}.", seen)
            else:
                yield key, at, child, inner

    def _pairs(self, node: MappingNode, prefix: str) -> list[tuple[str, Node, Node]]:
        """Keys as they are written, with their places and values; what ``<<`` brings gives way to the mapping's own."""
        own: dict[str, Node] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise UserError(f"{self._at(key)}: a key must be a word")
            if key.value in own and key.value != "<<":
                raise self._twice(f"{prefix}{key.value}", own[key.value], key)
            own[key.value] = key
        if "<<" in own:
            SafeConstructor().flatten_mapping(node)
        return list({key.value: (key.value, key, child) for key, child in node.value}.values())

    def value(self, node: Node, kind: Any, key: str) -> Any:
        """What a field of this kind gets."""
        if isinstance(node, ScalarNode):
            return self._scalar(node, kind, key)
        options = _options(kind)
        if isinstance(node, SequenceNode):
            items = next((get_args(option) for option in options if get_origin(option) in (tuple, list)), ())
            kinds = [items[0]] * len(node.value) if len(items) == 1 or items[1:] == (...,) else list(items)
            kinds += [Any] * (len(node.value) - len(kinds))
            return [self.value(child, kinds[n], f"{key}.{n}") for n, child in enumerate(node.value)]
        assert isinstance(node, MappingNode)
        section = _section(kind)
        values = next((get_args(option)[1] for option in options if get_origin(option) is dict), Any)
        return {
            name: self.value(child, kind_of(section, name) if section else values, f"{key}.{name}")
            for name, _, child in self._pairs(node, f"{key}.")
        }

    def _scalar(self, node: ScalarNode, kind: Any, key: str) -> Any:
        options = _options(kind)
        if not node.style and node.tag == _NULL:
            return None
        if Path in options or EXPANDED in options:
            try:
                text = expanded(node.value, self._here)
            except UserError as error:
                raise UserError(f"{key} = {node.value} ({self._at(node)}): {error}") from None
            return Path(text) if Path in options and text else text
        if node.style or _takes_text(kind):
            return node.value
        if kind is not Any and node.tag != "tag:yaml.org,2002:timestamp":
            self._refuse_other_base(node, key)
        return _constructed(node)

    def _refuse_other_base(self, node: ScalarNode, key: str) -> None:
        what = f"{key} = {node.value} ({self._at(node)})"
        if _LEADING_ZERO.fullmatch(node.value):
            raise UserError(f"{what}: YAML reads a leading zero as octal: write the decimal number without it")
        if _SEXAGESIMAL.fullmatch(node.value):
            raise UserError(f"{what}: YAML reads colons as base 60: write the number in decimal")

    def _twice(self, key: str, first: Node, second: Node) -> UserError:
        lines = " and ".join(str(line) for line in sorted({_line(first), _line(second)}))
        return UserError(f"{self._file or key}: {key} is set twice, in line {lines}: keep one")

    def _at(self, node: Node) -> str:
        return f"{self._file}:{_line(node)}" if self._file else "command line"


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _prefixes(key: str) -> Iterator[str]:
    names = key.split(".")
    return (".".join(names[:end]) for end in range(1, len(names)))


def _constructed(node: Node) -> Any:
    return SafeConstructor().construct_object(node, deep=True)


def _kind(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields[name]
    return Annotated[field.annotation, EXPANDED] if EXPANDED in field.metadata else field.annotation


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union, what Annotated holds, and the type of a literal's values."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType, Annotated):
        return tuple(option for part in get_args(kind) for option in _options(part))
    if origin is Literal:
        return tuple({type(value) for value in get_args(kind)})
    return (kind,)


def _section(kind: Any) -> type[BaseModel] | None:
    return next((option for option in _options(kind) if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _takes_text(kind: Any) -> bool:
    return any(option in (str, Path) for option in _options(kind))
