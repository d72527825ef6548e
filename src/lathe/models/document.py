"""Document: a raw text among conversations, as a row of one message that no chat template sees."""

from collections.abc import Mapping, Sequence
from typing import Any

DOCUMENT = "document"  # its role


def is_document(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a row is a raw text."""
    return len(messages) == 1 and messages[0]["role"] == DOCUMENT
