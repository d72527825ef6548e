"""Any server of the chat protocol of OpenAI: vLLM, llama.cpp, Ollama, OpenRouter and many more speak it."""

import logging
from collections.abc import Sequence
from typing import Any

from lathe.evaluation.judge.failures import (
    AskAgainError,
    DeclinedError,
    MalformedError,
    RefusedError,
    UnknownModelError,
)
from lathe.evaluation.judge.http_client import Session
from lathe.evaluation.judge.prompt import Question
from lathe.evaluation.judge.verdict import GRAMMAR_SCHEMA, SCHEMA, Answer

logger = logging.getLogger(__name__)

# How a server can be held to the schema, the strictest first: OpenAI's way, llama.cpp's, JSON of any kind, words alone.
FORMATS: tuple[dict[str, Any] | None, ...] = (
    {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}},
    {"type": "json_object", "schema": GRAMMAR_SCHEMA},
    {"type": "json_object"},
    None,
)

_NO_SUCH_MODEL = ("not exist", "not found", "not a valid", "no such", "unknown", "invalid model")


class OpenAI:
    """`POST chat/completions` with the strictest form of answer the server takes, which the first question tells."""

    most_at_once: int | None = None
    formats: Sequence[dict[str, Any] | None] = FORMATS
    temperature: float = 0.0

    def __init__(self, session: Session, *, key: str | None, model: str, max_tokens: int) -> None:
        self.session, self.model, self.max_tokens = session, model, max_tokens
        self._format = 0
        self._format_works = False
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}
        if key:
            session.secrets.add(key)

    async def close(self) -> None:
        """Close the connections."""
        await self.session.close()

    async def headers(self) -> dict[str, str]:
        """Return what a request is authorized by."""
        return self._authorization

    async def ask(self, question: Question) -> Answer:
        """Put one question once."""
        tried = self._format
        content = {
            "model": self.model,
            "messages": question.messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if (form := self.formats[tried]) is not None:
            content["response_format"] = form
        headers = await self.headers()
        try:
            answer = _answer(await self.session.post("/chat/completions", content, headers))
        except DeclinedError as error:
            if _no_such_model(error):
                raise UnknownModelError(str(error)) from None
            if not self.mends(error, tried, headers):
                raise
            raise AskAgainError(str(error)) from None
        self._format_works = True
        return answer

    async def models(self) -> list[str]:
        """Return the models of `GET models`."""
        listed = await self.session.get("/models", await self.headers())
        entries = listed.get("data") if isinstance(listed, dict) else None
        return [str(entry["id"]) for entry in entries or [] if isinstance(entry, dict) and "id" in entry]

    def mends(self, error: DeclinedError, tried: int, headers: dict[str, str]) -> bool:
        """Change what the server may have declined: the form of answer, numbered `tried`, or the headers.

        Returns whether it is worth another request.
        """
        if self._format_works or tried + 1 >= len(self.formats):
            return False
        # llama_cpp.server answers with 500 to a form of answer that it does not know.
        named = any(word in str(error) for word in ("response_format", "json_schema", "json_object", "grammar"))
        if not (error.status in (400, 415, 422, 501) or (error.status == 500 and named)):
            return False
        self._format = max(self._format, tried + 1)
        logger.debug("response_format %s is not taken: %s", self.formats[tried], error)
        return True


def _no_such_model(error: DeclinedError) -> bool:
    text = str(error).lower()
    told = "model" in text and any(words in text for words in _NO_SUCH_MODEL)
    return error.status == 404 or (error.status in (400, 403, 422) and told)


def _answer(content: Any) -> Answer:
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text, reason = message.get("content"), choice.get("finish_reason")
        refusal = message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise MalformedError("the server's answer has no choices[0].message") from None
    if refusal or reason in ("content_filter", "blacklist"):
        raise RefusedError(f"the judge refuses this row: {refusal or reason}")
    if not isinstance(text, str):
        raise MalformedError("the server's answer has no text")
    usage = content.get("usage")
    return Answer(
        text,
        model=str(content.get("model") or ""),
        input_tokens=count(usage, "prompt_tokens"),
        output_tokens=count(usage, "completion_tokens"),
        cut_off=reason == "length",
    )


def count(usage: Any, *keys: str) -> int | None:
    """Return the sum of token counts; None where the first is not there."""
    found = [usage.get(key) if isinstance(usage, dict) else None for key in keys]
    known = [value for value in found if isinstance(value, int) and not isinstance(value, bool) and value >= 0]
    return sum(known) if known and found[0] == known[0] else None
