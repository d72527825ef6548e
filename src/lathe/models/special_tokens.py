"""Special tokens: control tokens of a tokenizer that the text of a conversation must not contain."""

import re
from typing import Any


def compile_control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the texts that the tokenizer reads as control tokens, such as `<|im_end|>` or `</s>`.

    A message that holds one would end its own turn. The unknown token is not among them.
    """
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    tokens.discard(tokenizer.unk_token)
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
