"""Keys of the providers: from the environment alone, and never shown.

Only the standard library is imported here: `python -m lathe doctor` asks too.
"""

from collections.abc import Mapping

from lathe.common.errors import InputError

VARIABLES = {"openai": "OPENAI_API_KEY", "gemini": "GEMINI_API_KEY", "gigachat": "GIGACHAT_CREDENTIALS"}


def needed(provider: str, base_url: str | None) -> str | None:
    """Return the variable that must be set; None where a server of the user's own may do without a key."""
    return None if provider == "openai" and base_url else VARIABLES.get(provider)


def read(provider: str, base_url: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the provider's key, None where there is none and none is needed.

    Raises InputError, which names the variable and not its value.
    """
    variable = VARIABLES[provider]
    key = environment.get(variable, "").strip()
    if not key:
        if needed(provider, base_url):
            raise InputError(f"{variable} is not set, and judge.provider {provider} needs it; set it to your key")
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{variable} holds characters that no key has, such as a space within; set it to your key")
    return key
