"""Token segments: text cut before special tokens, so that parts that texts share are tokenized once."""

import re
from collections.abc import Iterable
from typing import Any

LONGEST_MARKER = 256  # characters of a special token before which a text is cut


def count_prompt_ids(prompt: list[str], text: list[str], ids: dict[str, list[int]]) -> int | None:
    """Return how many ids the prompt has if the text begins with them, else None; both are given in segments."""
    if not prompt:
        return 0
    *before, last = prompt
    place = len(before)
    if len(text) < len(prompt) or text[:place] != before or ids[text[place]][: len(ids[last])] != ids[last]:
        return None
    return sum([len(ids[segment]) for segment in prompt])


def tokenize_segments(tokenizer: Any, segments: Iterable[str]) -> dict[str, list[int]]:
    """Return the ids of each segment; one that several texts share is tokenized once."""
    unique = list(dict.fromkeys(segments))
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encoded = backend.encode_batch_fast(unique, add_special_tokens=False)
    return {segment: encoding.ids for segment, encoding in zip(unique, encoded, strict=True)}


def concatenate(parts: list[list[int]]) -> list[int]:
    """Return the ids of all parts in one list."""
    ids: list[int] = []
    for part in parts:
        ids += part
    return ids


def split_segments(starts: re.Pattern[str], text: str) -> list[str]:
    """Cut a text before each match of `starts`."""
    cuts = [match.start() for match in starts.finditer(text)]
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < stop]


def compile_segment_starts(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the special tokens before which a text can be cut without changing its ids.

    The tokenizer looks for added tokens first, from left to right, and tokenizes the text between them piece by piece.
    So a cut is safe before a token that is matched in the text as it is (not normalized), wherever it is (not
    `single_word`), takes no white space from the left, and cannot lose its first characters to another added token.
    """
    if tokenizer.backend_tokenizer.encode_special_tokens:
        return re.compile("(?!)")
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content and not token.normalized]
    candidates = {
        token.content
        for token in added
        if token.special
        and len(token.content) <= LONGEST_MARKER
        and not (token.single_word or token.lstrip or token.content[0].isspace())
    }
    safe = candidates - _find_covered(candidates, {token.content for token in added})
    return re.compile("|".join(map(re.escape, sorted(safe))) or "(?!)")


def _find_covered(tokens: set[str], texts: set[str]) -> set[str]:
    """Return those of `tokens` whose first characters one of `texts`, matched further left in a text, can take.

    That is: the end of such a text is the beginning of the token, or the token stands inside of it.
    """
    ends = {text[start:] for text in texts for start in range(max(1, len(text) - LONGEST_MARKER), len(text))}
    covered = {token for token in tokens if any(token[:length] in ends for length in range(1, len(token) + 1))}
    lengths = {len(token) for token in tokens}
    for text in texts:
        for length in lengths:
            covered |= tokens & {text[start : start + length] for start in range(1, len(text) - length)}
    return covered
