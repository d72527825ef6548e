"""In which script a text is written: what can be told of its language without a model."""

import re
import unicodedata
from collections import Counter
from functools import cache

# By the first word of a letter's Unicode name.
_SCRIPTS = {
    "CJK": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "ARABIC": "Arabic",
    "ARMENIAN": "Armenian",
    "BENGALI": "Bengali",
    "CYRILLIC": "Cyrillic",
    "DEVANAGARI": "Devanagari",
    "ETHIOPIC": "Ethiopic",
    "GEORGIAN": "Georgian",
    "GREEK": "Greek",
    "GUJARATI": "Gujarati",
    "GURMUKHI": "Gurmukhi",
    "HANGUL": "Hangul",
    "HEBREW": "Hebrew",
    "KANNADA": "Kannada",
    "KHMER": "Khmer",
    "LAO": "Lao",
    "LATIN": "Latin",
    "MALAYALAM": "Malayalam",
    "MONGOLIAN": "Mongolian",
    "MYANMAR": "Myanmar",
    "ORIYA": "Oriya",
    "SINHALA": "Sinhala",
    "TAMIL": "Tamil",
    "TELUGU": "Telugu",
    "THAI": "Thai",
    "TIBETAN": "Tibetan",
}

_ASCII_LETTER = re.compile("[A-Za-z]")


def script(text: str) -> str:
    """Return the script of most of the text's letters, `none` where it has no letter."""
    if text.isascii():
        return "Latin" if _ASCII_LETTER.search(text) else "none"
    letters: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if found := _script_of(character):
            letters[found] += count
    # Of equals the first by name: the order of letters in the text must not matter.
    return min(letters, key=lambda name: (-letters[name], name)) if letters else "none"


@cache
def _script_of(character: str) -> str | None:
    if not character.isalpha():
        return None
    return _SCRIPTS.get(unicodedata.name(character, "").partition(" ")[0].partition("-")[0], "other")
