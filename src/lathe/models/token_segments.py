"""Token segments: text cut before special tokens, so that shared parts are tokenized once."""

import re
from collections.abc import Iterable
from typing import Any


def _common_length(prompt: list[str], whole: list[str], ids: dict[str, list[int]]) -> int | None:
    """Return how many ids the prompt has if the whole begins with them, else None; both are given in segments."""
    if not prompt:
        return 0
    *before, last = prompt
    place = len(before)
    if len(whole) < len(prompt) or whole[:place] != before or ids[whole[place]][: len(ids[last])] != ids[last]:
        return None
    return sum([len(ids[segment]) for segment in prompt])


def _ids(tokenizer: Any, segments: Iterable[str]) -> dict[str, list[int]]:
    """Return the ids of each segment; one that several texts share is tokenised once."""
    unique = list(dict.fromkeys(segments))
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encoded = backend.encode_batch_fast(unique, add_special_tokens=False)
    return {segment: encoding.ids for segment, encoding in zip(unique, encoded, strict=True)}


def _concatenated(parts: list[list[int]]) -> list[int]:
    whole: list[int] = []
    for part in parts:
        whole += part
    return whole


def _segments(starts: re.Pattern[str], text: str) -> list[str]:
    cuts = [match.start() for match in starts.finditer(text)]
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < stop]


def _segment_starts(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the special tokens before which a text can be cut without changing its ids.

    The tokenizer looks for added tokens first, from left to right, and tokenises what lies between them piece by piece.
    That makes a cut safe before a token that is sought in the text as it stands, needs no neighbours to be found, takes
    no white space from the left, and cannot lose its first characters to another added token.
    """
    if tokenizer.backend_tokenizer.encode_special_tokens:
        return re.compile("(?!)")
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content and not token.normalized]
    texts = {token.content for token in added}
    safe = sorted(
        token.content
        for token in added
        if token.special
        and not (token.single_word or token.lstrip or token.content[0].isspace())
        and not any(_can_cover(other, token.content) for other in texts)
    )
    return re.compile("|".join(map(re.escape, safe)) or "(?!)")


def _can_cover(other: str, token: str) -> bool:
    """Tell whether `other`, found from further left in a text, can hold the first characters of `token`."""
    start = other.find(token[0], 1)
    while start > 0:
        if token.startswith(other[start:]) or other.startswith(token, start):
            return True
        start = other.find(token[0], start + 1)
    return False
