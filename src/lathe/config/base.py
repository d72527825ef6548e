"""Building blocks of every section of the parameters: strict models, number types, descriptions of keys."""

import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from lathe.common.text import _shown

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
Split = Literal["train", "validation", "test"]

REPOSITORY = r"\w[\w.-]*(/\w[\w.-]*)?"

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def entry(meaning: str, unit: str | None = None) -> Any:
    """Describe a required key; the text is also the comment beside it in `params.yaml`."""
    return Field(description=meaning, json_schema_extra={"unit": unit} if unit else None)


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def _with_group(pattern: str, what: str) -> str:
    if not _groups(pattern):
        raise ValueError(f"pattern {pattern!r} has no group; put parentheses around the {what}")
    return pattern


def plain_address(address: str) -> str:
    """Return the address of a server, in which no key may stand; raises ValueError, which shows none either."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", address):
        raise ValueError(
            f"{_shown(re.sub('//.*@|[?#].*', '…', address))} is no plain address; write http(s)://HOST[:PORT][/PATH] "
            "and put keys into the environment"
        )
    return address


class Section(BaseModel):
    """A group of keys: unknown ones are refused, no type is coerced, nothing can be changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def section_of(kind: Any) -> type[Section] | None:
    """Return the class of the keys that a value of this type has, or its entries where it is a list."""
    if get_origin(kind) is list:
        [kind] = get_args(kind)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None
