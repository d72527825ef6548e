"""API keys of judge providers: read from environment variables only, and never shown.

This module imports no package, because `python -m lathe doctor` uses it too.
"""

from collections.abc import Mapping

from lathe.common.api_key import read_api_key
from lathe.common.errors import InputError

VARIABLES = {"openai": "OPENAI_API_KEY", "gemini": "GEMINI_API_KEY", "gigachat": "GIGACHAT_CREDENTIALS"}


def get_required_variable(provider: str, base_url: str | None) -> str | None:
    """Return the environment variable that must be set; None if the provider can do without a key."""
    return None if provider == "openai" and base_url else VARIABLES.get(provider)


def read_key(provider: str, base_url: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the provider's key; None if there is none and none is required.

    Raises InputError, which names the variable and never its value.
    """
    variable = VARIABLES[provider]
    key = read_api_key(variable, environment)
    if key is None and get_required_variable(provider, base_url):
        raise InputError(
            f"{variable} is not set, and judge.provider {provider} needs it; set it to your key", code="missing-key"
        )
    return key
