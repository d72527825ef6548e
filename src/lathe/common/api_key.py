"""API key of a server: read from an environment variable, and never shown."""

from collections.abc import Mapping

from lathe.common.errors import InputError


def read_api_key(variable: str, environment: Mapping[str, str]) -> str | None:
    """Return the key in a variable; None if it is not set. Raises InputError, without the value, for what is no key."""
    key = environment.get(variable, "").strip()
    if key and (not key.isascii() or not key.isprintable() or " " in key):
        raise InputError(
            f"{variable} holds a space or another character that no key has; set it to your key", code="invalid-key"
        )
    return key or None
