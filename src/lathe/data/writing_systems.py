"""Writing systems: the script that a text is written in, by its letters; needs no language model."""

import re
import unicodedata
from collections import Counter
from functools import cache

# Script by the first word of a letter's Unicode name.
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


def detect_writing_system(text: str) -> str:
    """Return the script of most of the text's letters (`Latin`, `Han`, ...), or `none` if it has no letter."""
    if text.isascii():
        return "Latin" if _ASCII_LETTER.search(text) else "none"
    letters: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := _get_script(character):
            letters[script] += count
    # Of equally frequent scripts the first by name, so that the order of the letters does not matter.
    return min(letters, key=lambda name: (-letters[name], name)) if letters else "none"


@cache
def _get_script(character: str) -> str | None:
    if not character.isalpha():
        return None
    return _SCRIPTS.get(unicodedata.name(character, "").partition(" ")[0].partition("-")[0], "other")
