"""Requests passed on to llama-server, and its answers passed back, piece by piece where they are streamed."""

import asyncio
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import httpx2

from lathe.inference.serve_limits import MODELS_PATH, Receive, RequestError, Scope, Send, send_error

logger = logging.getLogger(__name__)

SECONDS_TO_CONNECT = 5.0
EVENT_STREAM = "text/event-stream"
# What llama-server says of an answer to a request with tools whose calls it cannot read, in place of the answer.
UNREADABLE_CALLS = b"does not match the expected"


class Engine(Protocol):
    """What is asked: a server at a socket that may be another one after each start."""

    key: str

    @property
    def socket(self) -> Path:
        """Where it listens now."""


class EngineProxy:
    """An ASGI application that asks `engine`; requests have been checked before.

    Only method, path and body of a request reach it, and only status, type and body of its answer come back. While it
    is being started, the answer is 503; where it dies before an answer, 502. A stream that breaks off ends with an
    event that says so. A client that goes away ends its answer. An answer whose calls llama-server cannot read is
    given as text: a stream of it ends there, a whole one is asked for again, with the same prompt and its calls unread.
    """

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.engine, self.model_name = engine, model_name
        self._client: httpx2.AsyncClient | None = None
        self._socket: Path | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["path"] == MODELS_PATH:
            model = {"id": self.model_name, "object": "model", "owned_by": "lathe", "created": 0}
            await _send_json(send, {"object": "list", "data": [model]})
            return
        body = (await receive())["body"]
        answer = asyncio.create_task(self._answer(scope["path"], body, send))
        gone = asyncio.create_task(_wait_until_gone(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
            with suppress(asyncio.CancelledError):
                await answer

    async def _answer(self, path: str, body: bytes, send: Send) -> None:
        try:
            await self._pass_on(path, body, send)
        except RequestError as error:
            await send_error(send, error)

    async def _pass_on(self, path: str, body: bytes, send: Send) -> None:
        response = await self._ask(path, body)
        try:
            kind = response.headers.get("content-type", "application/json")
            if response.status_code == 200 and kind.startswith(EVENT_STREAM):
                await _pass_stream_back(response, kind, send)
                return
            status, content = response.status_code, await _read(response)
        finally:
            await response.aclose()
        if status == 500 and UNREADABLE_CALLS in content:
            again = await self._ask(path, json.dumps({**json.loads(body), "tool_choice": "none"}).encode())
            try:
                status, content = again.status_code, await _read(again)
            finally:
                await again.aclose()
        if status == 503:
            raise RequestError(503, "the engine is loading the model; send the request again in a few seconds")
        await _send_whole(send, status, kind, content)

    async def _ask(self, path: str, body: bytes) -> httpx2.Response:
        """Send a request; return the answer, whose body is still to be read."""
        headers = {"authorization": f"Bearer {self.engine.key}", "content-type": "application/json"}
        client = await self._connect()
        request = client.build_request("POST", f"http://engine{path}", content=body, headers=headers)
        try:
            return await client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise RequestError(503, "the engine is being started; send the request again in a few seconds") from None
        except httpx2.HTTPError:
            raise _DIED from None

    async def _connect(self) -> httpx2.AsyncClient:
        """Return a client of the engine that runs now. Connections are not kept: one may have been closed meanwhile."""
        if self._client is None or self._socket != self.engine.socket:
            before, self._socket = self._client, self.engine.socket
            self._client = httpx2.AsyncClient(
                transport=httpx2.AsyncHTTPTransport(
                    uds=str(self._socket), limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0)
                ),
                timeout=httpx2.Timeout(None, connect=SECONDS_TO_CONNECT),
            )
            if before is not None:
                await before.aclose()
        return self._client


_DIED = RequestError(502, "the engine has ended while it answered; send the request again")


async def _read(response: httpx2.Response) -> bytes:
    try:
        return await response.aread()
    except httpx2.HTTPError:
        raise _DIED from None


async def _pass_stream_back(response: httpx2.Response, kind: str, send: Send) -> None:
    headers = [(b"content-type", kind.encode("latin-1")), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    last = b""
    try:
        async for piece in response.aiter_raw():
            before, found, error = piece.rpartition(b'data: {"error"')
            if found and UNREADABLE_CALLS in error:
                piece = before + _end_stream(before or last)
            last = piece
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except httpx2.HTTPError:
        died = {"error": {"message": str(_DIED), "type": "server_error", "code": _DIED.status}}
        await send({"type": "http.response.body", "body": f"data: {json.dumps(died)}\n\n".encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _end_stream(before: bytes) -> bytes:
    """Return the end of a stream of text, in the form of the piece before it."""
    *_, event = [line for line in before.splitlines() if line.startswith(b"data: {")] or [b"data: {}"]
    chunk = json.loads(event.removeprefix(b"data: "))
    chunk["choices"] = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    return f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()


async def _send_json(send: Send, value: Any) -> None:
    await _send_whole(send, 200, "application/json", json.dumps(value).encode())


async def _send_whole(send: Send, status: int, kind: str, content: bytes) -> None:
    headers = [(b"content-type", kind.encode("latin-1")), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
