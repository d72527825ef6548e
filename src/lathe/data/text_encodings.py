"""Text encodings: which one a file that is not UTF-8 probably has, by the letters at its beginning."""

import codecs
import re
import unicodedata
from collections import Counter

# UTF-32 before UTF-16, whose mark its own begins with.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# Encodings of one byte per character, by the writing system whose letters they are recognised by.
CANDIDATES = {"cp1251": "CYRILLIC", "koi8-r": "CYRILLIC", "cp866": "CYRILLIC", "cp1252": "LATIN"}

# Share of the letters outside ASCII in words as the script has them, above which an encoding may be named.
MIN_FITTING_FRACTION = 0.9
MIN_LETTERS = 3
# Four of five letters of a Russian text; read in another encoding, others take their place.
FREQUENT_LETTERS = frozenset("оеаинтсрвлкмдпу")
MIN_FREQUENT_FRACTION = 0.5
# charset-normalizer: how much it reads, how disordered the text may be, and how much it must be like a language.
NORMALIZER_BYTES = 1 << 14
MAX_CHAOS = 0.1
MIN_COHERENCE = 0.3
ASIAN = ("cp932", "euc_jp", "gb18030", "big5", "cp949")
OTHERS = ("cp1250", "iso8859_2", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r", "koi8_u")
# Lines of boxes, narrow katakana and characters without a meaning: what the wrong encoding makes of letters.
_UNLIKELY = re.compile(r"[\u2500-\u259f\uff61-\uff9f\ue000-\uf8ff]")
MAX_UNLIKELY_FRACTION = 0.1
# Quotes, dashes, dots, signs and the space that does not break, at the places that all of Windows' encodings have them:
# what English from an office has beyond ASCII. Signs of money stand beside numbers.
_TYPOGRAPHY = re.compile(
    rb"[\x82\x84-\x87\x89\x8b\x91-\x97\x99\x9b\xa0\xa6\xa7\xa9\xab-\xae\xb0\xb1\xb5-\xb7\xbb]"
    rb"|[\x80\xa3](?= ?[0-9])|(?<=[0-9])[\x80\xa3]|(?<=[0-9] )[\x80\xa3]"
)
_WORD = re.compile(r"[^\W\d_]+")


def guess_encoding(sample: bytes) -> str | None:
    """Return the name of the encoding that a text probably has; None if it is UTF-8, or if it cannot be told.

    A UTF-8 text with a few damaged bytes is of no other encoding. Names are those of Python, which iconv knows too.
    """
    for mark, name in BYTE_ORDER_MARKS.items():
        if sample.startswith(mark):
            return name
    if b"\0" in sample:
        return _guess_wide_encoding(sample)
    decoded = sample.decode("utf-8", "replace")
    damaged = decoded.count("\ufffd")
    if damaged < sum(not character.isascii() for character in decoded) - damaged:
        return None
    fitting = {name: _count_fitting_letters(sample, name, script) for name, script in CANDIDATES.items()}
    if not _TYPOGRAPHY.sub(b"", sample).isascii():
        best = max(fitting, key=lambda name: fitting[name])
    else:
        return "cp1252"
    own = best if fitting[best] >= MIN_LETTERS else None
    # Other scripts read as koi8-r are Russian letters without sense: its letters fill the half above ASCII.
    return own if own and own != "koi8-r" else _ask_charset_normalizer(sample) or own


def _guess_wide_encoding(sample: bytes) -> str | None:
    """Return which UTF-16 a text without a byte order mark has: the upper bytes of a script are nearly all the same."""
    halves = {"utf-16-be": sample[0::2], "utf-16-le": sample[1::2]}
    for name, upper in halves.items():
        frequent = sum(count for _, count in Counter(upper).most_common(2))
        if 0 in upper and frequent >= MIN_FITTING_FRACTION * len(upper):
            return name
    return None


def _ask_charset_normalizer(sample: bytes) -> str | None:
    """Return the encoding by charset-normalizer, where its text is that of a known language or an Asian one."""
    from charset_normalizer import from_bytes

    whole_lines = sample[: sample.rfind(b"\n", 0, NORMALIZER_BYTES) + 1] or sample[:NORMALIZER_BYTES]
    for candidates in ([*ASIAN, *OTHERS], OTHERS):
        best = from_bytes(whole_lines, cp_isolation=list(candidates)).best()
        if best is None or best.chaos > MAX_CHAOS:
            continue
        name, text = codecs.lookup(best.encoding).name, str(best)
        letters = sum(not character.isascii() for character in text)
        likely = len(_UNLIKELY.findall(text)) <= MAX_UNLIKELY_FRACTION * letters
        if letters < MIN_LETTERS:
            return None
        if likely and (name in ASIAN or best.coherence >= MIN_COHERENCE):
            return name
    return None


def _count_fitting_letters(sample: bytes, encoding: str, script: str) -> int:
    """Return how many letters outside ASCII, the frequent ones twice, are in words as the script has them.

    A word of Cyrillic letters has no other ones, and one in the Latin script has more ASCII letters. 0 unless this is
    so of nearly all words, and if too few letters are frequent ones.
    """
    text = sample.decode(encoding, "replace")
    words = [word for word in _WORD.findall(text) if not word.isascii()]
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
    if len(_UNLIKELY.findall(text)) > MAX_UNLIKELY_FRACTION * total:
        return 0
    if fitting < MIN_FITTING_FRACTION * total or frequent < MIN_FREQUENT_FRACTION * fitting:
        return 0
    return fitting + frequent
