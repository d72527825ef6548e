"""Who judges: one module per protocol."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lathe.common.errors import InputError
from lathe.evaluation.judge.prompt import Question
from lathe.evaluation.judge.verdict import Answer

if TYPE_CHECKING:
    from lathe.config.params import Judge

ADDRESSES = {
    "openai": "https://api.openai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta",
    "gigachat": "https://gigachat.devices.sberbank.ru/api/v1",
}


class Provider(Protocol):
    """A model that answers questions; `most_at_once` is None where the server may be asked as much as one likes."""

    most_at_once: int | None

    async def ask(self, question: Question) -> Answer:
        """Put one question once, at temperature 0.

        Raises UnavailableError, MalformedError, RefusedError, UnknownModelError, AskAgainError, DeclinedError for what
        these do not name, and InputError where nothing else need be asked.
        """

    async def models(self) -> list[str]:
        """Return the models that the server says it knows."""

    async def close(self) -> None:
        """Close connections, free memory."""


def identity(settings: "Judge", root: Path) -> dict[str, str]:
    """Return what tells one judge from another: a verdict of one is none of another's. Needs neither key nor network.

    A file is known by its content: moved or renamed it is the same judge.
    """
    if settings.provider == "gguf":
        file = root / settings.model
        if not file.is_file():
            raise InputError(
                f"judge.model is {settings.model!r}: no such file; judge.provider gguf takes the path of a GGUF file"
            )
        with file.open("rb") as content:
            return {"provider": "gguf", "model_sha256": hashlib.file_digest(content, "sha256").hexdigest()}
    return {"provider": settings.provider, "model": settings.model, "address": address(settings)}


def address(settings: "Judge") -> str:
    """Return where the provider is: `judge.base_url`, or its public address."""
    return (settings.base_url or ADDRESSES[settings.provider]).rstrip("/")


def connect(settings: "Judge", questions: Collection[Question], environment: Mapping[str, str], root: Path) -> Provider:
    """Open the provider that will be asked `questions`; nothing is sent yet.

    Raises InputError for a missing key, certificates that cannot be read, or a file that is no model.
    """
    if settings.provider == "gguf":
        from lathe.evaluation.judge.providers.gguf import Gguf

        return Gguf(root / settings.model, questions, max_tokens=settings.max_tokens)

    from lathe.evaluation.judge import api_keys
    from lathe.evaluation.judge.http_client import Session, certificates

    key = api_keys.read(settings.provider, settings.base_url, environment)
    trusted = certificates(root / settings.ca_bundle if settings.ca_bundle else None)

    def session(url: str) -> Session:
        return Session(url, certificates=trusted, timeout_seconds=settings.timeout_seconds)

    common: dict[str, Any] = {"model": settings.model, "max_tokens": settings.max_tokens}
    match settings.provider:
        case "gemini":
            from lathe.evaluation.judge.providers.gemini import Gemini

            return Gemini(session(address(settings)), key=str(key), **common)
        case "gigachat":
            from lathe.evaluation.judge.providers.gigachat import GigaChat, auth_address

            signing_in = session(auth_address(environment))
            return GigaChat(session(address(settings)), signing_in, str(key), environment, **common)
    from lathe.evaluation.judge.providers.openai import OpenAI

    return OpenAI(session(address(settings)), key=key, **common)
