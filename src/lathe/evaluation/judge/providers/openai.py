"""OpenAI's chat protocol, which vLLM, llama.cpp, Ollama, OpenRouter and many other servers speak."""

import logging
from collections.abc import Sequence
from typing import Any

from lathe.common.http_session import HttpSession, HttpStatusError, MalformedError
from lathe.evaluation.judge.failures import RetryAtOnceError, RowRefusedError, UnknownModelError
from lathe.evaluation.judge.prompt import JudgePrompt
from lathe.evaluation.judge.verdict import GRAMMAR_SCHEMA, SCHEMA, JudgeAnswer

logger = logging.getLogger(__name__)

# Response formats, the strictest first: OpenAI's JSON schema, llama.cpp's, any JSON, no format at all.
FORMATS: tuple[dict[str, Any] | None, ...] = (
    {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}},
    {"type": "json_object", "schema": GRAMMAR_SCHEMA},
    {"type": "json_object"},
    None,
)

_UNKNOWN_MODEL_PHRASES = ("not exist", "not found", "not a valid", "no such", "unknown", "invalid model")


class OpenAI:
    """`POST chat/completions` with the strictest response format that the server accepts, as the first prompt shows."""

    max_concurrency: int | None = None
    formats: Sequence[dict[str, Any] | None] = FORMATS
    temperature: float = 0.0

    def __init__(self, session: HttpSession, *, key: str | None, model: str, max_tokens: int) -> None:
        self.session, self.model, self.max_tokens = session, model, max_tokens
        self._format = 0
        self._format_works = False
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}
        if key:
            session.secrets.add(key)

    async def close(self) -> None:
        """Close the connections."""
        await self.session.close()

    async def get_headers(self) -> dict[str, str]:
        """Return the headers that authorize a request."""
        return self._authorization

    async def request_answer(self, prompt: JudgePrompt) -> JudgeAnswer:
        """Send one prompt once."""
        tried = self._format
        content = {
            "model": self.model,
            "messages": prompt.messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if (form := self.formats[tried]) is not None:
            content["response_format"] = form
        headers = await self.get_headers()
        try:
            answer = _parse_answer(await self.session.post("/chat/completions", content, headers))
        except HttpStatusError as error:
            if _is_unknown_model(error):
                raise UnknownModelError(str(error)) from None
            if not self.adapt_request(error, tried, headers):
                raise
            raise RetryAtOnceError(str(error)) from None
        self._format_works = True
        return answer

    async def list_models(self) -> list[str]:
        """Return the models that `GET models` lists."""
        listed = await self.session.get("/models", await self.get_headers())
        entries = listed.get("data") if isinstance(listed, dict) else None
        return [str(entry["id"]) for entry in entries or [] if isinstance(entry, dict) and "id" in entry]

    def adapt_request(self, error: HttpStatusError, tried: int, headers: dict[str, str]) -> bool:
        """Switch to the next response format if the server refused the one numbered `tried`.

        Returns whether the request should be sent again at once.
        """
        if self._format_works or tried + 1 >= len(self.formats):
            return False
        # llama_cpp.server answers 500 to a response format that it does not know.
        named = any(word in str(error) for word in ("response_format", "json_schema", "json_object", "grammar"))
        if not (error.status in (400, 415, 422, 501) or (error.status == 500 and named)):
            return False
        self._format = max(self._format, tried + 1)
        logger.debug("response_format %s is not accepted: %s", self.formats[tried], error)
        return True


def _is_unknown_model(error: HttpStatusError) -> bool:
    text = str(error).lower()
    names_model = "model" in text and any(words in text for words in _UNKNOWN_MODEL_PHRASES)
    return error.status == 404 or (error.status in (400, 403, 422) and names_model)


def _parse_answer(content: Any) -> JudgeAnswer:
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text, reason = message.get("content"), choice.get("finish_reason")
        refusal = message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise MalformedError("the server's response has no choices[0].message") from None
    if refusal or reason in ("content_filter", "blacklist"):
        raise RowRefusedError(f"the judge refuses this row: {refusal or reason}")
    if not isinstance(text, str):
        raise MalformedError("the server's response has no text")
    usage = content.get("usage")
    return JudgeAnswer(
        text,
        model=str(content.get("model") or ""),
        input_tokens=sum_tokens(usage, "prompt_tokens"),
        output_tokens=sum_tokens(usage, "completion_tokens"),
        cut_off=reason == "length",
    )


def sum_tokens(usage: Any, *keys: str) -> int | None:
    """Return the sum of the token counts under these keys; None if the first is missing."""
    values = [usage.get(key) if isinstance(usage, dict) else None for key in keys]
    # No server has counted a quadrillion; SQLite could not store many more.
    counts = [value for value in values if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1e15]
    return sum(counts) if counts and values[0] == counts[0] else None
