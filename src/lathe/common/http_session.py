"""HTTP session: requests to one server, bounded and without redirects; errors are one line without secrets."""

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from lathe.common.errors import InputError
from lathe.common.redaction import hide_secrets

_MAX_SHOWN_CHARACTERS = 300
_MAX_RESPONSE_BYTES = 8 << 20  # unpacked; an answer has some thousand


class HttpStatusError(Exception):
    """The server answered with a status other than 2xx; the message is the server's, without secrets.

    `retry_after` is the delay that the server asks for, in seconds, or None.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class UnavailableError(Exception):
    """No answer at present: the request is retried, and if that fails too, the run stops.

    `billed` says that the server may have processed the request, and charge for it.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, billed: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.billed = retry_after, billed


class MalformedError(Exception):
    """The answer is not what was asked for: the request is retried, and if that fails too, there is no answer."""


class HttpSession:
    """Connections to the server at `address`, which `key` of params.yaml names.

    Redirects are not followed, so that a key is sent to no other address than the user's. Texts in `secrets` are
    removed from everything that the server returns. A response may take twice `timeout_seconds` as a whole, and 8 MiB.
    `trust` is where a user names other certificates than the usual ones.
    """

    def __init__(
        self, address: str, *, key: str, trust: str, certificates: ssl.SSLContext | None, timeout_seconds: float
    ) -> None:
        self.address, self._key, self._trust = address.rstrip("/"), key, trust
        self.secrets: set[str] = set()
        self._deadline_seconds = 2 * timeout_seconds
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
        """Send JSON and return the JSON of the response."""
        return await self.request("POST", path, headers, json=content)

    async def get(self, path: str, headers: Mapping[str, str]) -> Any:
        """Return the JSON of the response."""
        return await self.request("GET", path, headers)

    async def request(self, method: str, path: str, headers: Mapping[str, str], **content: Any) -> Any:
        """Return the JSON of a response with a 2xx status.

        Raises HttpStatusError for another status, UnavailableError for no response, MalformedError for a response that
        is not JSON, and InputError if a retry cannot help: certificates, redirects, an invalid address.
        """
        try:
            async with asyncio.timeout(self._deadline_seconds):
                response, body = await self._read(method, f"{self.address}{path}", headers, content)
        except TimeoutError:
            raise UnavailableError(
                f"{self.address} has not ended its answer within {self._deadline_seconds:g} s", billed=True
            ) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise InputError(
                    f"{self.address}: its certificate is not trusted; name a file with the certificates of its "
                    f"authority in {self._trust}",
                    code="untrusted-certificate",
                ) from None
            raise UnavailableError(f"{self.address} cannot be reached: {self._describe_error(error)}") from None
        except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise InputError(
                f"{self.address}: {self._describe_error(error)}; check {self._key}", code="invalid-address"
            ) from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise UnavailableError(
                f"{self.address} closed the connection: {self._describe_error(error)}", billed=True
            ) from None
        text = hide_secrets(body.decode(response.encoding or "utf-8", "replace"), self.secrets)
        if response.is_redirect:
            raise InputError(
                f"{self.address} redirects ({response.status_code}), which is not followed: the key would go "
                f"to another server; set {self._key} to the server's own address",
                code="redirect",
            )
        if not response.is_success:
            raise HttpStatusError(response.status_code, _extract_message(text), _parse_retry_after(response.headers))
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise MalformedError(f"the server's response is not JSON: {_shorten(text)!r}") from None

    async def _read(
        self, method: str, address: str, headers: Mapping[str, str], content: Mapping[str, Any]
    ) -> tuple[httpx2.Response, bytes]:
        """Return a response and its body, read piece by piece: it may be small and unpack to gigabytes."""
        body = bytearray()
        async with self._client.stream(method, address, headers=headers, **content) as response:
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > _MAX_RESPONSE_BYTES:
                    raise MalformedError(f"the server's response is longer than {_MAX_RESPONSE_BYTES >> 20} MiB")
        return response, bytes(body)

    def _describe_error(self, error: Exception) -> str:
        return _shorten(hide_secrets(str(error), self.secrets)) or type(error).__name__


def _extract_message(text: str) -> str:
    """Return the message of an error response, whichever of the usual JSON forms the server uses."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return _shorten(text)
    if isinstance(tree, list) and tree:
        tree = tree[0]
    for key in ("error", "message", "detail"):
        if isinstance(tree, dict) and tree.get(key):
            tree = tree[key]
    return _shorten(tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False))


def _shorten(text: str) -> str:
    line = "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
    return line if len(line) <= _MAX_SHOWN_CHARACTERS else f"{line[:_MAX_SHOWN_CHARACTERS]}…"


def _parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of the Retry-After header, in either of its forms (RFC 9110, 10.2.3); None without one."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
