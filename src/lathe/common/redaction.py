"""Redaction: secrets taken out of a text before it is shown."""

from collections.abc import Collection

HIDDEN = "[hidden]"


def hide(text: str, secrets: Collection[str]) -> str:
    """Replace secrets that stand in a text, as a server may repeat what it was sent."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text
