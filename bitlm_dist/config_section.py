"""The base of all sections of a config, and the marks of their fields.

A mark stands in the annotation of a field, ``Annotated[int, Resume.FREE]``, or in ``Section.marks``
for all fields of a section that bear none of its kind. What a field says of itself no other module
has to list.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Resume(Enum):
    """What a resumed run may do with a key. No mark: keep it, as it would be another run."""

    FREE = "change it"
    LENGTHEN = "change it, unless the learning-rate schedule depends on it"


@dataclass(frozen=True)
class AllowedBy:
    """A key that a resumed run may change if it sets another key to true, which is its consent."""

    key: str


class Trained(Enum):
    """What a key is to a trained model, which `bitlm eval` and `bitlm generate` load."""

    TRAINING = "is a key of training"  # so is a key without a mark
    MODEL = "describes the trained model, which stays as it is"
    FREE = "may be changed"


class Section(BaseModel):
    """A frozen section of the config.

    It refuses unknown keys, numbers that are not finite, and booleans where a number is expected.
    """

    marks: ClassVar[tuple[Resume | Trained, ...]] = ()

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads true as 1, which is hardly ever what a writer of `steps: yes` meant
        assert info.field_name is not None
        if _contains_boolean(value) and not _accepts_boolean(
            cls.model_fields[info.field_name].annotation
        ):
            raise ValueError("expected another value than true or false")
        return value


def _contains_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, list | tuple) and any(map(_contains_boolean, value))
    )


def _accepts_boolean(kind: Any) -> bool:
    return kind is bool or any(map(_accepts_boolean, get_args(kind)))
