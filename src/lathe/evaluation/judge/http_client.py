"""Requests to one server: nothing is sent elsewhere, and what goes wrong is said in one line without secrets."""

import json
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2

from lathe.common.errors import InputError
from lathe.common.redaction import hide
from lathe.evaluation.judge.failures import DeclinedError, MalformedError, UnavailableError

_SHOWN_CHARACTERS = 300


class Session:
    """Connections to the server at `address`.

    Redirects are not followed: a key is sent to the address that the user named and to no other.
    """

    def __init__(self, address: str, *, certificates: ssl.SSLContext | None, timeout_seconds: float) -> None:
        self.address = address.rstrip("/")
        self.secrets: set[str] = set()
        self._client = httpx2.AsyncClient(
            verify=certificates or True,
            timeout=timeout_seconds,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=None),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def post(self, path: str, content: Any, headers: Mapping[str, str]) -> Any:
        """Send JSON and return the JSON of the answer."""
        return await self.request("POST", path, headers, json=content)

    async def get(self, path: str, headers: Mapping[str, str]) -> Any:
        """Return the JSON of the answer."""
        return await self.request("GET", path, headers)

    async def request(self, method: str, path: str, headers: Mapping[str, str], **content: Any) -> Any:
        """Return the JSON of an answer with a status of 2xx.

        Raises DeclinedError for another status, UnavailableError for no answer, MalformedError for an answer that is
        not JSON, and InputError where no further attempt can help: certificates, redirects, an impossible address.
        """
        try:
            response = await self._client.request(method, f"{self.address}{path}", headers=headers, **content)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise InputError(
                    f"{self.address}: its certificate is not trusted; name a file with the certificates of its "
                    "authority in judge.ca_bundle"
                ) from None
            raise UnavailableError(f"{self.address} cannot be reached: {self._reason(error)}") from None
        except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise InputError(f"{self.address}: {self._reason(error)}; check judge.base_url") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise UnavailableError(f"{self.address} broke off: {self._reason(error)}", billed=True) from None
        text = hide(response.text, self.secrets)
        if response.is_redirect:
            raise InputError(
                f"{self.address} redirects ({response.status_code}), which is not followed: the key would go "
                "elsewhere; set judge.base_url to the server's own address"
            )
        if not response.is_success:
            raise DeclinedError(response.status_code, _message(text), _retry_after(response.headers))
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise MalformedError(f"the server's answer is not JSON: {_short(text)!r}") from None

    def _reason(self, error: Exception) -> str:
        return _short(hide(str(error), self.secrets)) or type(error).__name__


def certificates(ca_bundle: Path | None) -> ssl.SSLContext | None:
    """Return what to trust instead of the usual authorities; raises InputError for a file that holds no certificate."""
    if ca_bundle is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_bundle)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or "it holds no certificate"
        raise InputError(f"judge.ca_bundle is {ca_bundle}: {reason}; name a file with PEM certificates") from None


def _message(text: str) -> str:
    """Take the sentence out of the forms in which servers put their errors."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return _short(text)
    if isinstance(tree, list) and tree:
        tree = tree[0]
    for key in ("error", "message", "detail"):
        if isinstance(tree, dict) and tree.get(key):
            tree = tree[key]
    return _short(tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False))


def _short(text: str) -> str:
    line = "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from either form of the header (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
