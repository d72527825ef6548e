"""Gemini: Google's REST API `generateContent`, with the verdict's schema as `responseSchema`."""

from typing import Any
from urllib.parse import quote

from lathe.common.errors import InputError
from lathe.common.http_session import HttpSession, HttpStatusError, MalformedError
from lathe.evaluation.judge.api_keys import VARIABLES
from lathe.evaluation.judge.failures import RowRefusedError, UnknownModelError
from lathe.evaluation.judge.prompt import JudgePrompt
from lathe.evaluation.judge.providers.openai import sum_tokens
from lathe.evaluation.judge.verdict import JudgeAnswer

# Gemini's subset of OpenAPI, which has no additionalProperties.
RESPONSE_SCHEMA = {
    "type": "OBJECT",
    "properties": {
        "score": {"type": "INTEGER", "minimum": 0, "maximum": 100},
        "reason": {"type": "STRING"},
    },
    "required": ["score", "reason"],
    "propertyOrdering": ["score", "reason"],
}

# Finish reasons of a candidate without an answer.
_REFUSALS = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "OTHER"}
_MODELS_PER_PAGE = 1000


class Gemini:
    """The Gemini API; the key is sent in a header, never in the address, which ends up in logs."""

    max_concurrency: int | None = None

    def __init__(self, session: HttpSession, *, key: str, model: str, max_tokens: int) -> None:
        self.session, self.model, self.max_tokens = session, model.removeprefix("models/"), max_tokens
        self._headers = {"x-goog-api-key": key}
        session.secrets.add(key)

    async def close(self) -> None:
        """Close the connections."""
        await self.session.close()

    async def request_answer(self, prompt: JudgePrompt) -> JudgeAnswer:
        """Send one prompt once."""
        content = {
            "system_instruction": {"parts": [{"text": prompt.system}]},
            "contents": [{"role": "user", "parts": [{"text": prompt.user}]}],
            "generationConfig": {
                "temperature": 0,
                "maxOutputTokens": self.max_tokens,
                "candidateCount": 1,
                "responseMimeType": "application/json",
                "responseSchema": RESPONSE_SCHEMA,
            },
        }
        try:
            path = f"/models/{quote(self.model, safe='')}:generateContent"
            return self._parse_answer(await self.session.post(path, content, self._headers))
        except HttpStatusError as error:
            if error.status == 404:
                raise UnknownModelError(str(error)) from None
            if error.status == 400 and "api key" in str(error).lower():
                raise InputError(
                    f"{self.session.address} refuses the key ({error}); set {VARIABLES['gemini']} to a valid one",
                    code="invalid-key",
                ) from None
            raise

    async def list_models(self) -> list[str]:
        """Return the models that support `generateContent`."""
        names: list[str] = []
        page = ""
        while True:
            listed = await self.session.get(f"/models?pageSize={_MODELS_PER_PAGE}{page}", self._headers)
            for entry in listed.get("models", []):
                if "generateContent" in entry.get("supportedGenerationMethods", ["generateContent"]):
                    names.append(str(entry.get("name", "")).removeprefix("models/"))
            if not listed.get("nextPageToken"):
                return names
            page = f"&pageToken={quote(str(listed['nextPageToken']), safe='')}"

    def _parse_answer(self, content: Any) -> JudgeAnswer:
        blocked = content.get("promptFeedback", {}).get("blockReason") if isinstance(content, dict) else None
        if blocked:
            raise RowRefusedError(f"the judge refuses this row: {blocked}")
        try:
            candidate = content["candidates"][0]
            reason = candidate.get("finishReason")
            parts = candidate.get("content", {}).get("parts", [])
            text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise MalformedError("the server's response has no candidates[0].content") from None
        if reason in _REFUSALS:
            raise RowRefusedError(f"the judge refuses this row: {reason}")
        usage = content.get("usageMetadata")
        return JudgeAnswer(
            text,
            model=str(content.get("modelVersion") or ""),
            input_tokens=sum_tokens(usage, "promptTokenCount"),
            output_tokens=sum_tokens(usage, "candidatesTokenCount", "thoughtsTokenCount"),
            cut_off=reason == "MAX_TOKENS",
        )
