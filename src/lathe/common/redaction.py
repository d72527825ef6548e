"""Redaction: secrets removed from a text before it is shown."""

from collections.abc import Collection

HIDDEN = "[hidden]"


def hide_secrets(text: str, secrets: Collection[str]) -> str:
    """Replace secrets in a text: a server may repeat what it was sent."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text
