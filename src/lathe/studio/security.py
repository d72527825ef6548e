"""Guard of the studio: who is answered, from where, with what headers, and how much may be sent.

The studio starts commands, so that a page of another site that could reach it would own the machine. Nothing is
answered without the session's cookie, which the one-time link gives, or a bearer token from the environment. The cookie
is SameSite=Strict; `Host` must be the studio's own (a name that an attacker points to 127.0.0.1 is refused), and so
must `Origin` where there is one. Whatever changes something needs the session's CSRF token too.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException

COOKIE = "lathe_studio"
CSRF_HEADER = "x-csrf-token"
LINK = "/open"  # the address that takes the one-time token
UPLOADS = ("/api/data/", "/api/lineage", "/lineage/dropped")  # addresses that take a file

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
LARGEST_REQUEST_BYTES = 2_000_000
SECONDS_TO_SEND = 20.0  # between two parts of a request's body

# No inline script or style, no other host. `data:` is for the pictures of charts.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


@dataclass
class Session:
    """The secrets of one studio process; they are in its memory alone.

    `link_token` opens the session once; `bearer` is the token of programs, None: there is none.
    """

    hosts: frozenset[str]
    bearer: str | None = None
    largest_upload_bytes: int = 500_000_000
    link_token: str | None = field(default_factory=lambda: secrets.token_urlsafe(32))
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def csrf_token(self) -> str:
        """The token that pages send with whatever changes something."""
        return hmac.new(self.secret.encode(), b"csrf", hashlib.sha256).hexdigest()

    def use_link(self, token: str) -> bool:
        """Tell whether this is the token of the link; it is no longer after that."""
        if self.link_token is None or not hmac.compare_digest(token.encode(), self.link_token.encode()):
            return False
        self.link_token = None
        return True

    def has_cookie(self, header: str) -> bool:
        """Tell whether a Cookie header holds the session."""
        try:
            morsel = SimpleCookie(header).get(COOKIE)
        except CookieError:
            return False
        return morsel is not None and hmac.compare_digest(morsel.value.encode(), self.secret.encode())

    def has_bearer(self, header: str) -> bool:
        """Tell whether an Authorization header holds the token of programs."""
        kind, _, given = header.partition(" ")
        return (
            self.bearer is not None
            and kind.lower() == "bearer"
            and hmac.compare_digest(given.strip().encode(), self.bearer.encode())
        )


def list_hosts(port: int) -> frozenset[str]:
    """Return what the header Host may be."""
    return frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost"))


class Guard:
    """ASGI application around the studio's own that refuses what may not be answered."""

    def __init__(self, app: Any, session: Session, *, seconds_to_send: float = SECONDS_TO_SEND) -> None:
        self.app, self.session, self.seconds_to_send = app, session, seconds_to_send

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] == LINK and self._is_from_here(headers) and scope["method"] == "GET":
            await self._open(scope, send)
            return
        if refusal := self._find_refusal(scope, headers):
            await _refuse(send, *refusal)
            return
        limit = self.session.largest_upload_bytes if scope["path"].startswith(UPLOADS) else LARGEST_REQUEST_BYTES
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > limit:
            await _refuse(send, 413, "too-large", f"a request may have {limit:,} bytes; send less")
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                # A browser asks whether a file of the studio's own has changed; nothing else is kept.
                kept = [(b"cache-control", b"no-cache")] if scope["path"].startswith("/static/") else []
                message = {**message, "headers": _add_headers([*message["headers"], *kept])}
            await send(message)

        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        # Without a body there is nothing to wait for but the end of the connection, which a stream of events does.
        await self.app(scope, self._limit(receive, limit) if has_body else receive, send_with_headers)

    def _is_from_here(self, headers: dict[str, str]) -> bool:
        if headers.get("host", "").lower() not in self.session.hosts:
            return False
        origin = headers.get("origin")
        return origin is None or origin.lower() in {f"http://{host}" for host in self.session.hosts}

    def _find_refusal(self, scope: dict[str, Any], headers: dict[str, str]) -> tuple[int, str, str] | None:
        if headers.get("host", "").lower() not in self.session.hosts:
            return 403, "foreign-host", "this address is not the studio's; open the link that `lathe studio` printed"
        if not self._is_from_here(headers) or headers.get("sec-fetch-site") == "cross-site":
            return 403, "foreign-origin", "a page of another site asked for this; open the studio itself"
        is_program = scope["path"].startswith("/api/") and self.session.has_bearer(headers.get("authorization", ""))
        if is_program:
            return None
        if not self.session.has_cookie(headers.get("cookie", "")):
            return 401, "no-session", "open the link that `lathe studio` printed; each is good for one browser"
        given = headers.get(CSRF_HEADER, "")
        if scope["method"] not in SAFE_METHODS and not hmac.compare_digest(
            given.encode(), self.session.csrf_token.encode()
        ):
            return 403, "no-csrf-token", "the page is of an earlier studio; load it again"
        return None

    async def _open(self, scope: dict[str, Any], send: Any) -> None:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not self.session.use_link(given):
            await _refuse(send, 401, "used-link", "this link has been used, or is another studio's; start a new one")
            return
        cookie = f"{COOKIE}={self.session.secret}; Path=/; HttpOnly; SameSite=Strict"
        # A page and no redirect: after a link that was clicked elsewhere a browser would keep a Strict cookie back.
        page = b'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/">'
        page += b'<title>Lathe</title><link rel="icon" href="/static/icon.svg">'
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"set-cookie", cookie.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": _add_headers(headers)})
        await send({"type": "http.response.body", "body": page})

    def _limit(self, receive: Any, limit: int) -> Any:
        """Return `receive` with the limit of bytes and of time; after the body it waits for as long as need be."""
        taken, complete = 0, False

        async def receive_within_limits() -> Any:
            nonlocal taken, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.seconds_to_send)
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {self.seconds_to_send:g} s; send it again") from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            if taken > limit:
                raise HTTPException(413, f"a request may have {limit:,} bytes; send less")
            return message

        return receive_within_limits


def _add_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    own = list(headers)
    known = {name.lower() for name, _ in own}
    added = {**HEADERS, "content-security-policy": CONTENT_SECURITY_POLICY}
    return own + [(name.encode(), text.encode()) for name, text in added.items() if name.encode() not in known]


async def _refuse(send: Any, status: int, code: str, message: str) -> None:
    body = json.dumps({"code": code, "message": message}, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": _add_headers(headers)})
    await send({"type": "http.response.body", "body": body})
