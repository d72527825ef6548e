"""Judge providers: the interface that all protocols share, and the choice of one by judge.provider."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lathe.common.errors import InputError
from lathe.evaluation.judge.prompt import JudgePrompt
from lathe.evaluation.judge.verdict import JudgeAnswer

if TYPE_CHECKING:
    from lathe.config.params import Judge

ADDRESSES = {
    "openai": "https://api.openai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta",
    "gigachat": "https://gigachat.devices.sberbank.ru/api/v1",
}


class Provider(Protocol):
    """A judge: a model that answers prompts. `max_concurrency` limits requests in flight; None: no limit of its own."""

    max_concurrency: int | None

    async def request_answer(self, prompt: JudgePrompt) -> JudgeAnswer:
        """Send one prompt once, at temperature 0.

        Raises UnavailableError, MalformedError, RowRefusedError, UnknownModelError, RetryAtOnceError; HttpStatusError
        for a status that none of these describes; and InputError if no other prompt need be sent either.
        """

    async def list_models(self) -> list[str]:
        """Return the models that the server lists."""

    async def close(self) -> None:
        """Close connections and free memory."""


def identify_judge(settings: "Judge", root: Path) -> dict[str, str]:
    """Return what identifies the judge, as a part of verdict keys. Needs neither key nor network.

    A GGUF file is identified by its content, so that moving or renaming it keeps its verdicts.
    """
    if settings.provider == "gguf":
        with require_judge_file(settings, root).open("rb") as content:
            return {"provider": "gguf", "model_sha256": hashlib.file_digest(content, "sha256").hexdigest()}
    return {"provider": settings.provider, "model": settings.model, "address": get_address(settings)}


def require_judge_file(settings: "Judge", root: Path) -> Path:
    """Return the file of a judge on this machine; raises InputError if it is not there."""
    file = root / settings.model
    if not file.is_file():
        raise InputError(
            f"judge.model is {settings.model!r}: no such file; judge.provider gguf takes the path of a GGUF file",
            code="missing-file",
        )
    return file


def get_address(settings: "Judge") -> str:
    """Return `judge.base_url`, or the provider's public address."""
    return (settings.base_url or ADDRESSES[settings.provider]).rstrip("/")


def connect_provider(
    settings: "Judge", prompts: Collection[JudgePrompt], environment: Mapping[str, str], root: Path
) -> Provider:
    """Return the provider that judge.provider names, for these `prompts`; nothing is sent yet.

    Raises InputError for a missing key, certificates that cannot be read, or a file that is no model.
    """
    if settings.provider == "gguf":
        from lathe.evaluation.judge.providers.gguf import Gguf

        return Gguf(root / settings.model, prompts, max_tokens=settings.max_tokens)

    from lathe.common.http_session import HttpSession
    from lathe.evaluation.judge import api_keys
    from lathe.evaluation.judge.certificates import load_certificates

    key = api_keys.read_key(settings.provider, settings.base_url, environment)
    trusted = load_certificates(root / settings.ca_bundle if settings.ca_bundle else None)

    def open_session(url: str) -> HttpSession:
        return HttpSession(
            url,
            key="judge.base_url",
            trust="judge.ca_bundle",
            certificates=trusted,
            timeout_seconds=settings.timeout_seconds,
        )

    common: dict[str, Any] = {"model": settings.model, "max_tokens": settings.max_tokens}
    match settings.provider:
        case "gemini":
            from lathe.evaluation.judge.providers.gemini import Gemini

            return Gemini(open_session(get_address(settings)), key=str(key), **common)
        case "gigachat":
            from lathe.evaluation.judge.providers.gigachat import GigaChat, get_auth_address

            auth_session = open_session(get_auth_address(environment))
            return GigaChat(open_session(get_address(settings)), auth_session, str(key), environment, **common)
    from lathe.evaluation.judge.providers.openai import OpenAI

    return OpenAI(open_session(get_address(settings)), key=key, **common)
