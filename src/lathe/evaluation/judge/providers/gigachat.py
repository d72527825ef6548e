"""Sber's GigaChat: the protocol of OpenAI behind tokens that last for half an hour.

The authorization key (`GIGACHAT_CREDENTIALS`) goes to the authorization address alone, the tokens that it gives go to
the chat. Both servers have certificates of a Russian authority: `judge.ca_bundle` names the file that holds it.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

from lathe.common.errors import InputError
from lathe.evaluation.judge.api_keys import VARIABLES
from lathe.evaluation.judge.failures import DeclinedError, MalformedError, UnavailableError
from lathe.evaluation.judge.http_client import Session
from lathe.evaluation.judge.prompt import Question
from lathe.evaluation.judge.providers.openai import OpenAI
from lathe.evaluation.judge.verdict import SCHEMA, Answer

AUTH_ADDRESS = "https://ngw.devices.sberbank.ru:9443/api/v2/oauth"
SCOPE = "GIGACHAT_API_PERS"  # for persons; GIGACHAT_API_B2B and GIGACHAT_API_CORP for companies

_SECONDS_BEFORE_EXPIRY = 60.0
_LONGEST_SECONDS_SINCE_1970 = 1e11  # above it, a time is in milliseconds: documentation and servers differ


def auth_address(environment: Mapping[str, str]) -> str:
    """Return where tokens are had: `GIGACHAT_AUTH_URL`, by its name in Sber's own client, or the public address."""
    return environment.get("GIGACHAT_AUTH_URL") or AUTH_ADDRESS


class GigaChat(OpenAI):
    """`POST chat/completions` with a token that is renewed before it expires, or when the server no longer takes it."""

    formats = ({"type": "json_schema", "schema": SCHEMA, "strict": True}, None)
    temperature = 0.0001  # 0 is not allowed; up to 0.001 the server takes the likeliest token

    def __init__(
        self,
        session: Session,
        signing_in: Session,
        credentials: str,
        environment: Mapping[str, str],
        *,
        model: str,
        max_tokens: int,
    ) -> None:
        super().__init__(session, key=None, model=model, max_tokens=max_tokens)
        self.signing_in = signing_in
        self._credentials = credentials
        self._scope = environment.get("GIGACHAT_SCOPE") or SCOPE
        self._token, self._expires, self._fresh = "", 0.0, True
        self._renewing = asyncio.Lock()
        session.secrets.add(credentials)
        signing_in.secrets.add(credentials)

    async def close(self) -> None:
        """Close the connections."""
        await self.signing_in.close()
        await super().close()

    async def headers(self) -> dict[str, str]:
        """Return the token, a new one where it is about to expire."""
        async with self._renewing:
            if time.time() > self._expires - _SECONDS_BEFORE_EXPIRY:
                await self._renew()
        return {"Authorization": f"Bearer {self._token}"}

    def mends(self, error: DeclinedError, tried: int, headers: dict[str, str]) -> bool:
        """Also: a token that was taken back before its time is renewed; a fresh one that is refused is not."""
        if error.status != 401:
            return super().mends(error, tried, headers)
        if headers != {"Authorization": f"Bearer {self._token}"} or not self._expires:
            return True  # another request has seen to it
        if self._fresh:
            return False
        self._expires = 0.0
        return True

    async def ask(self, question: Question) -> Answer:
        """Put one question once."""
        answer = await super().ask(question)
        self._fresh = False
        return answer

    async def _renew(self) -> None:
        headers = {
            "Authorization": f"Basic {self._credentials}",
            "RqUID": str(uuid.uuid4()),
            "Accept": "application/json",
        }
        try:
            given = await self.signing_in.request("POST", "", headers, data={"scope": self._scope})
        except DeclinedError as error:
            if error.status in (400, 401, 403):
                raise InputError(
                    f"{self.signing_in.address} refuses the credentials ({error}); set {VARIABLES['gigachat']} to the "
                    f"authorization key, and GIGACHAT_SCOPE, which is {self._scope}, to the scope it is for"
                ) from None
            raise UnavailableError(
                f"{self.signing_in.address} gives no token: {error}", retry_after=error.retry_after
            ) from None
        except UnavailableError as error:
            error.billed = False  # no judge was asked
            raise
        (self._token, self._expires), self._fresh = _token(given), True
        self.session.secrets.add(self._token)


def _token(given: Any) -> tuple[str, float]:
    try:
        token, expires = given["access_token"], float(given["expires_at"])
    except (KeyError, TypeError, ValueError):
        raise MalformedError("the authorization answers without access_token and expires_at") from None
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise MalformedError("the authorization's access_token is no token")
    return token, expires / 1000 if expires > _LONGEST_SECONDS_SINCE_1970 else expires
