"""Parameter sections: the strict base class, number types, and descriptions of keys."""

import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from lathe.common.bounded_regex import compile_pattern
from lathe.common.errors import InputError
from lathe.common.text import shorten_value

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
OptionName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
OptionValue = (
    bool | int | Annotated[float, Field(allow_inf_nan=False)] | Name | Annotated[list[Name], Field(min_length=1)]
)
Auto = Literal["auto"]
Split = Literal["train", "validation", "test"]

REPOSITORY = r"\w[\w.-]*(/\w[\w.-]*)?"

# A commit, tag or branch of the Hub; it is also the name of a file in the cache, so no part of it is `..`.
REVISION = r"\w[\w+-]*([./][\w+-]+)*"

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def entry(meaning: str, unit: str | None = None) -> Any:
    """Return the field of a required key; meaning and unit are also the comment beside the key in `params.yaml`."""
    return Field(description=meaning, json_schema_extra={"unit": unit} if unit else None)


def get_number(value: int | Auto) -> int:
    """Return a number that may be auto in params.yaml, where it has been chosen by now."""
    if value == "auto":
        raise ValueError("a number that is auto has not been chosen")
    return value


def count_groups(pattern: str) -> int:
    """Return the number of groups of a regular expression; raises ValueError if it is none, or may never end."""
    try:
        return compile_pattern(pattern).groups
    except InputError as error:
        raise ValueError(str(error)) from None


def require_group(pattern: str, what: str) -> str:
    """Return the pattern; raises ValueError if it has no group. `what` names what the group is to match."""
    if not count_groups(pattern):
        raise ValueError(f"pattern {pattern!r} has no group; put parentheses around the {what}")
    return pattern


def check_plain_address(address: str) -> str:
    """Return the address of a server; raises ValueError if it is none, or might contain a key, without showing it."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", address):
        raise ValueError(
            f"{shorten_value(re.sub('(?s)//.*@|[?#].*', '…', address))} is not a plain address; write "
            "http(s)://HOST[:PORT][/PATH], and put keys into the environment"
        )
    return address


class Section(BaseModel):
    """A group of keys: unknown keys are refused, no type is coerced, and values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def section_of(kind: Any) -> type[Section] | None:
    """Return the Section that a field's type is, or that the entries of its list are; None for other types."""
    if get_origin(kind) is list:
        [kind] = get_args(kind)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None
