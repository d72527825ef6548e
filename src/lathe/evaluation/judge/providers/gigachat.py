"""GigaChat: Sber's service; OpenAI's protocol with access tokens that expire after half an hour.

The authorization key (`GIGACHAT_CREDENTIALS`) is sent to the authorization server only, and the access tokens that it
returns to the chat server. Both have certificates of a Russian authority: `judge.ca_bundle` names the file with it.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

from lathe.common.errors import InputError
from lathe.common.http_session import HttpSession, HttpStatusError, MalformedError, UnavailableError
from lathe.evaluation.judge.api_keys import VARIABLES
from lathe.evaluation.judge.prompt import JudgePrompt
from lathe.evaluation.judge.providers.openai import OpenAI
from lathe.evaluation.judge.verdict import SCHEMA, JudgeAnswer

AUTH_ADDRESS = "https://ngw.devices.sberbank.ru:9443/api/v2/oauth"
SCOPE = "GIGACHAT_API_PERS"  # for persons; GIGACHAT_API_B2B and GIGACHAT_API_CORP for companies

_SECONDS_BEFORE_EXPIRY = 60.0
_LONGEST_SECONDS_SINCE_1970 = 1e11  # above it, a time is in milliseconds: documentation and servers differ


def get_auth_address(environment: Mapping[str, str]) -> str:
    """Return the address of the authorization server: `GIGACHAT_AUTH_URL`, as in Sber's client, or the public one."""
    return environment.get("GIGACHAT_AUTH_URL") or AUTH_ADDRESS


class GigaChat(OpenAI):
    """`POST chat/completions` with an access token that is renewed before it expires, or if the server refuses it."""

    formats = ({"type": "json_schema", "schema": SCHEMA, "strict": True}, None)
    temperature = 0.0001  # 0 is not allowed; up to 0.001 the server decodes greedily

    def __init__(
        self,
        session: HttpSession,
        auth_session: HttpSession,
        credentials: str,
        environment: Mapping[str, str],
        *,
        model: str,
        max_tokens: int,
    ) -> None:
        super().__init__(session, key=None, model=model, max_tokens=max_tokens)
        self.auth_session = auth_session
        self._credentials = credentials
        self._scope = environment.get("GIGACHAT_SCOPE") or SCOPE
        self._token, self._expires, self._fresh = "", 0.0, True
        self._renewing = asyncio.Lock()
        session.secrets.add(credentials)
        auth_session.secrets.add(credentials)

    async def close(self) -> None:
        """Close the connections."""
        await self.auth_session.close()
        await super().close()

    async def get_headers(self) -> dict[str, str]:
        """Return the header with the access token, renewed if it is about to expire."""
        async with self._renewing:
            if time.time() > self._expires - _SECONDS_BEFORE_EXPIRY:
                await self._renew()
        return {"Authorization": f"Bearer {self._token}"}

    def adapt_request(self, error: HttpStatusError, tried: int, headers: dict[str, str]) -> bool:
        """Also renew a token that was revoked before it expired; a new token that is refused is an error."""
        if error.status != 401:
            return super().adapt_request(error, tried, headers)
        if headers != {"Authorization": f"Bearer {self._token}"} or not self._expires:
            return True  # another request has renewed it
        if self._fresh:
            return False
        self._expires = 0.0
        return True

    async def request_answer(self, prompt: JudgePrompt) -> JudgeAnswer:
        """Send one prompt once."""
        answer = await super().request_answer(prompt)
        self._fresh = False
        return answer

    async def _renew(self) -> None:
        headers = {
            "Authorization": f"Basic {self._credentials}",
            "RqUID": str(uuid.uuid4()),
            "Accept": "application/json",
        }
        try:
            response = await self.auth_session.request("POST", "", headers, data={"scope": self._scope})
        except HttpStatusError as error:
            if error.status in (400, 401, 403):
                raise InputError(
                    f"{self.auth_session.address} refuses the credentials ({error}); set {VARIABLES['gigachat']} to "
                    f"the authorization key, and GIGACHAT_SCOPE, which is {self._scope}, to the scope it is for",
                    code="invalid-key",
                ) from None
            raise UnavailableError(
                f"{self.auth_session.address} gives no token: {error}", retry_after=error.retry_after
            ) from None
        except UnavailableError as error:
            error.billed = False  # no prompt was sent
            raise
        (self._token, self._expires), self._fresh = _parse_token(response), True
        self.session.secrets.add(self._token)


def _parse_token(response: Any) -> tuple[str, float]:
    try:
        token, expires = response["access_token"], float(response["expires_at"])
    except (KeyError, TypeError, ValueError):
        raise MalformedError("the authorization server's response has no access_token and expires_at") from None
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise MalformedError("the authorization server's access_token is no token")
    return token, expires / 1000 if expires > _LONGEST_SECONDS_SINCE_1970 else expires
