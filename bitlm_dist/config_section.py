"""The base of all sections of a config."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen section of the config.

    It refuses unknown keys, numbers that are not finite, and booleans where a number is expected.
    """

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
