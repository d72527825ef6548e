"""Texts of the pages in the reader's language: English in the templates, other languages as a catalogue beside them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

LANGUAGES = {"en": "English", "ru": "Русский"}
COOKIE = "lathe_language"

_FOLDER = Path(__file__).parent / "texts"


def choose_language(cookie: str | None, accepted: str) -> str:
    """Return the language that was chosen, or the first that the browser accepts; English if it is none of these."""
    if cookie in LANGUAGES:
        return cookie
    for part in accepted.split(","):
        language = part.partition(";")[0].strip().lower().partition("-")[0]
        if language in LANGUAGES:
            return language
    return "en"


def make_translation(language: str) -> Callable[[str], str]:
    """Return the function that translates a text; a text that the catalogue lacks stays English."""
    catalogue = read_catalogue(language)
    return lambda text: catalogue.get(text, text)


@cache
def read_catalogue(language: str) -> dict[str, str]:
    """Return the catalogue of a language, by the English texts; empty for English."""
    file = _FOLDER / f"{language}.json"
    if language == "en" or not file.is_file():
        return {}
    content: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return content
