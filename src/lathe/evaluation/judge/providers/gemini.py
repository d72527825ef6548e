"""Google's Gemini: `generateContent` of its REST API, held to the schema by `responseSchema`."""

from typing import Any
from urllib.parse import quote

from lathe.common.errors import InputError
from lathe.evaluation.judge.api_keys import VARIABLES
from lathe.evaluation.judge.failures import DeclinedError, MalformedError, RefusedError, UnknownModelError
from lathe.evaluation.judge.http_client import Session
from lathe.evaluation.judge.prompt import Question
from lathe.evaluation.judge.providers.openai import count
from lathe.evaluation.judge.verdict import Answer

# Its own subset of OpenAPI, which has no additionalProperties.
RESPONSE_SCHEMA = {
    "type": "OBJECT",
    "properties": {
        "score": {"type": "INTEGER", "minimum": 0, "maximum": 100},
        "reason": {"type": "STRING"},
    },
    "required": ["score", "reason"],
    "propertyOrdering": ["score", "reason"],
}

# Why a candidate ends that holds no answer of the model's own.
_REFUSALS = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "OTHER"}
_PAGE = 1000


class Gemini:
    """The key is sent in a header, never in the address, where logs would keep it."""

    most_at_once: int | None = None

    def __init__(self, session: Session, *, key: str, model: str, max_tokens: int) -> None:
        self.session, self.model, self.max_tokens = session, model.removeprefix("models/"), max_tokens
        self._headers = {"x-goog-api-key": key}
        session.secrets.add(key)

    async def close(self) -> None:
        """Close the connections."""
        await self.session.close()

    async def ask(self, question: Question) -> Answer:
        """Put one question once."""
        content = {
            "system_instruction": {"parts": [{"text": question.system}]},
            "contents": [{"role": "user", "parts": [{"text": question.user}]}],
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
            return self._answer(await self.session.post(path, content, self._headers))
        except DeclinedError as error:
            if error.status == 404:
                raise UnknownModelError(str(error)) from None
            if error.status == 400 and "api key" in str(error).lower():
                raise InputError(
                    f"{self.session.address} refuses the key ({error}); set {VARIABLES['gemini']} to a valid one"
                ) from None
            raise

    async def models(self) -> list[str]:
        """Return the models that can generate content."""
        found: list[str] = []
        page = ""
        while True:
            listed = await self.session.get(f"/models?pageSize={_PAGE}{page}", self._headers)
            for entry in listed.get("models", []):
                if "generateContent" in entry.get("supportedGenerationMethods", ["generateContent"]):
                    found.append(str(entry.get("name", "")).removeprefix("models/"))
            if not listed.get("nextPageToken"):
                return found
            page = f"&pageToken={quote(str(listed['nextPageToken']), safe='')}"

    def _answer(self, content: Any) -> Answer:
        blocked = content.get("promptFeedback", {}).get("blockReason") if isinstance(content, dict) else None
        if blocked:
            raise RefusedError(f"the judge refuses this row: {blocked}")
        try:
            candidate = content["candidates"][0]
            reason = candidate.get("finishReason")
            parts = candidate.get("content", {}).get("parts", [])
            text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise MalformedError("the server's answer has no candidates[0].content") from None
        if reason in _REFUSALS:
            raise RefusedError(f"the judge refuses this row: {reason}")
        usage = content.get("usageMetadata")
        return Answer(
            text,
            model=str(content.get("modelVersion") or ""),
            input_tokens=count(usage, "promptTokenCount"),
            output_tokens=count(usage, "candidatesTokenCount", "thoughtsTokenCount"),
            cut_off=reason == "MAX_TOKENS",
        )
