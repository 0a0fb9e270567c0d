"""YAML reader guided by the types of the fields, without YAML 1.1's surprises.

YAML 1.1 reads 0100 as 64, 1:30 as 90, ``on`` as a boolean and 2024-01-01 as a date, and of two
equal keys it keeps the last. This reader passes text fields the text as written and expands paths.
It refuses duplicate keys and numbers in another base, and names file and line.
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
from bitlm_dist.paths import expand_path

EXPANDED = "expanded"  # in Annotated[str, EXPANDED]: text to expand like a path
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_NULL = "tag:yaml.org,2002:null"
_NULLS = ("", "~", "null", "Null", "NULL")


class SourcedValue(NamedTuple):
    """A value and where it was set, e.g. ``run.yaml:3``."""

    value: Any
    source: str


def read_yaml_file(file: Path, model: type[BaseModel]) -> dict[str, SourcedValue]:
    """Read a YAML file into values by dotted key.

    Args:
        file: a mapping, nested or with dotted keys; may be empty.
        model: its fields determine how values are read. Unknown keys are kept, for the caller to
            refuse.

    Raises:
        UserError: the file is no valid YAML, a key or section is set twice, or a value is
            ambiguous; names file and line.
    """
    # compose keeps the nodes, and with them the text as written and the line numbers
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is None:
            return {}
        if not isinstance(root, MappingNode):
            found = type(_constructed(root)).__name__
            raise UserError(f"{file} must hold `key: value` lines, found a {found}")
        return _YamlReader(str(file), file.parent).entries(root, model)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"{file}{line} is no valid YAML: {error.problem or error.context}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{file}: an anchor refers to itself: write the value out") from None


def parse_override(text: str, key: str, annotation: Any) -> Any:
    """Read a value from the command line.

    Args:
        text: the word; YAML quotes around it are removed.
        key: key that the word sets.
        annotation: annotation of the key's field; Any if unknown.

    Raises:
        UserError: the value is ambiguous; names the key.
    """
    plain_node = ScalarNode("tag:yaml.org,2002:str", text)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader) or ScalarNode(_NULL, "")
    except yaml.YAMLError:
        node = plain_node

    # In a text field `a: b`, `[x]` and `a #b` may be names of files.
    quoted = isinstance(node, ScalarNode) and node.style in ("'", '"')
    if _accepts_text(annotation) and not quoted and text not in _NULLS:
        node = plain_node

    return _YamlReader("", None).value(node, annotation, key)


def annotation_of(model: Any, key: str) -> Any:
    """The annotation of a dotted key's field; Any if there is no such field.

    Args:
        model: a section, or a union of sections, of which the first with the field counts.
        key: the dotted key.
    """
    annotation = model
    for name in key.split("."):
        sections = [s for s in model_classes(annotation) if name in s.model_fields]
        if not sections:
            return Any
        annotation = _field_annotation(sections[0], name)
    return annotation


class _YamlReader:
    """Reads the nodes of one document.

    Args:
        file: name for messages; empty for the command line.
        here: folder of the file.
    """

    def __init__(self, file: str, here: Path | None) -> None:
        self._file = file
        self._here = here

    def entries(self, root: MappingNode, model: type[BaseModel]) -> dict[str, SourcedValue]:
        """Read a document into values by dotted key."""
        values: dict[str, SourcedValue] = {}
        seen: dict[str, Node] = {}
        for key, key_node, node, annotation in self._leaves(root, model, "", seen):
            values[key] = SourcedValue(self.value(node, annotation, key), self._location(key_node))

        # a section that was set as a whole and in part, e.g. `training: null` and `training.steps`
        for key in values:
            for prefix in _prefixes(key):
                if prefix in values:
                    raise self._duplicate_key_error(prefix, seen[prefix], seen[key])
        return values

    def _leaves(
        self, node: MappingNode, annotation: Any, prefix: str, seen: dict[str, Node]
    ) -> Iterator[tuple[str, Node, Node, Any]]:
        """Yield key, key node, value node and annotation of every field."""
        for name, key_node, child in self._pairs(node, prefix):
            key = f"{prefix}{name}"
            if key in seen:
                raise self._duplicate_key_error(key, seen[key], key_node)
            seen[key] = key_node

            inner = annotation_of(annotation, name)
            if isinstance(child, MappingNode) and (inner is Any or model_classes(inner)):
                yield from self._leaves(child, inner, f"{key}.", seen)
            else:
                yield key, key_node, child, inner

    def _pairs(self, node: MappingNode, prefix: str) -> list[tuple[str, Node, Node]]:
        """Keys of a mapping as written, with their key and value nodes.

        Keys merged by ``<<`` yield to the mapping's own.
        """
        key_nodes: dict[str, Node] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise UserError(f"{self._location(key)}: a key must be a word")
            if key.value in key_nodes and key.value != "<<":
                raise self._duplicate_key_error(f"{prefix}{key.value}", key_nodes[key.value], key)
            key_nodes[key.value] = key

        # flatten_mapping puts the merged keys first, so the mapping's own win in the dict below
        if "<<" in key_nodes:
            SafeConstructor().flatten_mapping(node)
        return list({key.value: (key.value, key, child) for key, child in node.value}.values())

    def value(self, node: Node, annotation: Any, key: str) -> Any:
        """Read a node for a field with this annotation."""
        if isinstance(node, ScalarNode):
            return self._scalar(node, annotation, key)
        if isinstance(node, SequenceNode):
            return self._sequence(node, annotation, key)

        assert isinstance(node, MappingNode)
        options = _union_members(annotation)
        is_section = bool(model_classes(annotation))
        values = next(
            (get_args(option)[1] for option in options if get_origin(option) is dict), Any
        )
        return {
            name: self.value(
                child, annotation_of(annotation, name) if is_section else values, f"{key}.{name}"
            )
            for name, _, child in self._pairs(node, f"{key}.")
        }

    def _sequence(self, node: SequenceNode, annotation: Any, key: str) -> list[Any]:
        options = _union_members(annotation)
        items = next(
            (get_args(option) for option in options if get_origin(option) in (tuple, list)), ()
        )

        # list[T] and tuple[T, ...] have one annotation for all items, tuple[T, U] one for each
        annotations = (
            [items[0]] * len(node.value) if len(items) == 1 or items[1:] == (...,) else list(items)
        )
        annotations += [Any] * (len(node.value) - len(annotations))
        return [
            self.value(child, annotations[n], f"{key}.{n}") for n, child in enumerate(node.value)
        ]

    def _scalar(self, node: ScalarNode, annotation: Any, key: str) -> Any:
        options = _union_members(annotation)
        if not node.style and node.tag == _NULL:  # a quoted "null" is text
            return None
        if not node.style and node.value == "None" and types.NoneType in options:
            raise UserError(
                f"{key} = None ({self._location(node)}): write null for no value, "
                "or './None' for a file of that name"
            )

        if Path in options or EXPANDED in options:
            try:
                text = expand_path(node.value, self._here)
            except UserError as error:
                raise UserError(f"{key} = {node.value} ({self._location(node)}): {error}") from None
            return Path(text) if Path in options and text else text

        if node.style or _accepts_text(annotation):
            return node.value
        if annotation is not Any and node.tag != "tag:yaml.org,2002:timestamp":
            self._refuse_other_base(node, key)
        return _constructed(node)

    def _refuse_other_base(self, node: ScalarNode, key: str) -> None:
        """Raise if YAML 1.1 reads this number in base 8 or 60."""
        what = f"{key} = {node.value} ({self._location(node)})"
        if _LEADING_ZERO.fullmatch(node.value):
            raise UserError(
                f"{what}: YAML reads a leading zero as octal: write the decimal number without it"
            )
        if _SEXAGESIMAL.fullmatch(node.value):
            raise UserError(f"{what}: YAML reads colons as base 60: write the number in decimal")

    def _duplicate_key_error(self, key: str, first: Node, second: Node) -> UserError:
        lines = " and ".join(str(line) for line in sorted({_line(first), _line(second)}))
        return UserError(f"{self._file or key}: {key} is set twice, in line {lines}: keep one")

    def _location(self, node: Node) -> str:
        return f"{self._file}:{_line(node)}" if self._file else "command line"


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _prefixes(key: str) -> Iterator[str]:
    names = key.split(".")
    return (".".join(names[:end]) for end in range(1, len(names)))


def _constructed(node: Node) -> Any:
    return SafeConstructor().construct_object(node, deep=True)


def _field_annotation(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields[name]
    return Annotated[field.annotation, EXPANDED] if EXPANDED in field.metadata else field.annotation


def _union_members(annotation: Any) -> tuple[Any, ...]:
    """Flatten a union into its members, Annotated into its contents, a literal into its types."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType, Annotated):
        return tuple(option for part in get_args(annotation) for option in _union_members(part))
    if origin is Literal:
        return tuple({type(value) for value in get_args(annotation)})
    return (annotation,)


def model_classes(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows: none, one, or those of a union."""
    return [
        option
        for option in _union_members(annotation)
        if isinstance(option, type) and issubclass(option, BaseModel)
    ]


def _accepts_text(annotation: Any) -> bool:
    return any(option in (str, Path) for option in _union_members(annotation))
