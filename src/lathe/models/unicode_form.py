"""Unicode form that a tokenizer brings text into before it reads it, such as NFC; llama.cpp reads text as it is."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@dataclass(frozen=True)
class UnicodeRule:
    """The form that text must be in for transformers and llama.cpp to read the same; `normalizes`: bring it into it."""

    form: Form
    normalizes: bool

    def find_difference(self, text: str) -> tuple[str, str] | None:
        """Return the first characters that differ, as they are and in the form; None where the text is in it.

        Of two that the form makes one, both are returned.
        """
        if unicodedata.is_normalized(self.form, text):
            return None
        normal = self.normalize(text)
        at = next((at for at, (one, other) in enumerate(zip(text, normal, strict=False)) if one != other), len(normal))
        alone = unicodedata.is_normalized(self.form, text[at : at + 1])
        return text[at : at + 1 + alone], normal[at : at + 1]

    def normalize(self, text: str) -> str:
        """Return the text in the form."""
        return unicodedata.normalize(self.form, text)


def find_unicode_form(tokenizer: Any) -> Form | None:
    """Return the form that a fast tokenizer brings text into; None where it leaves text as it is."""
    normalizer = json.loads(tokenizer.backend_tokenizer.to_str()).get("normalizer")
    kinds = [kind for kind in _list_kinds(normalizer) if kind in FORMS]
    return cast(Form, kinds[-1]) if kinds else None


def _list_kinds(normalizer: Any) -> Iterator[str]:
    if isinstance(normalizer, dict):
        yield str(normalizer.get("type"))
        for inner in normalizer.get("normalizers") or []:
            yield from _list_kinds(inner)
