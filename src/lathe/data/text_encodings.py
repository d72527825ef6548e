"""Text encodings: which one a file that is not UTF-8 probably has, for the message that refuses it."""

import codecs
import re
import unicodedata

BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

# Encodings of one byte per character, by the writing system whose letters they are recognised by.
CANDIDATES = {"cp1251": "CYRILLIC", "koi8-r": "CYRILLIC", "cp866": "CYRILLIC", "cp1252": "LATIN"}

# Share of the letters outside ASCII in words as the script has them, above which an encoding may be named.
MIN_FITTING_FRACTION = 0.9
MIN_LETTERS = 3
# Four of five letters of a Russian text; read in another encoding, others take their place.
FREQUENT_LETTERS = frozenset("оеаинтсрвлкмдпу")
MIN_FREQUENT_FRACTION = 0.5
_WORD = re.compile(r"[^\W\d_]+")


def guess_encoding(sample: bytes) -> str | None:
    """Return the name of the encoding that a text probably has; None if it is UTF-8, or if it cannot be told.

    A UTF-8 text with a few damaged bytes is of no other encoding. Names are those of Python, which iconv knows too.
    """
    for mark, name in BYTE_ORDER_MARKS.items():
        if sample.startswith(mark):
            return name
    decoded = sample.decode("utf-8", "replace")
    damaged = decoded.count("\ufffd")
    if damaged < sum(not character.isascii() for character in decoded) - damaged:
        return None
    fitting = {name: _count_fitting_letters(sample, name, script) for name, script in CANDIDATES.items()}
    best = max(fitting, key=lambda name: fitting[name])
    return best if fitting[best] >= MIN_LETTERS else None


def _count_fitting_letters(sample: bytes, encoding: str, script: str) -> int:
    """Return how many letters outside ASCII, the frequent ones twice, are in words as the script has them.

    A word of Cyrillic letters has no other ones, and one in the Latin script has more ASCII letters. 0 unless this is
    so of nearly all words, and if too few letters are frequent ones.
    """
    words = [word for word in _WORD.findall(sample.decode(encoding, "replace")) if not word.isascii()]
    fitting = frequent = total = 0
    for word in words:
        letters = [letter for letter in word if not letter.isascii()]
        total += len(letters)
        cyrillic = script == "CYRILLIC"
        mixed_well = len(letters) == len(word) if cyrillic else 2 * len(letters) <= len(word)
        cased_well = word == word.upper() or word[1:] == word[1:].lower()
        if mixed_well and cased_well and all(unicodedata.name(letter, "").startswith(script) for letter in letters):
            fitting += len(letters)
            frequent += sum(letter.lower() in FREQUENT_LETTERS for letter in letters) if cyrillic else len(letters)
    if fitting < MIN_FITTING_FRACTION * total or frequent < MIN_FREQUENT_FRACTION * fitting:
        return 0
    return fitting + frequent
