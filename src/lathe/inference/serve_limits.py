"""What the server lets in: who may ask, how large a request is, and nothing that ends or blocks the process.

llama.cpp ends the process on a grammar that refers to itself and on a token that it does not have, and
llama-cpp-python's application reads a body whole before it looks at the key.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from lathe.inference.json_schema_limits import SchemaError, resolve_schema

CHAT_PATH, COMPLETION_PATH, MODELS_PATH = "/v1/chat/completions", "/v1/completions", "/v1/models"
PATHS = {CHAT_PATH: "POST", COMPLETION_PATH: "POST", MODELS_PATH: "GET"}
LOCAL = {"127.0.0.1", "localhost", "::1"}
SECONDS_FOR_A_BODY = 30
MOST_STOPS = 16  # texts that end an answer
LONGEST_STOP = 256  # characters
MOST_LOGPROBS = 20  # as OpenAI has it
DEEPEST = 100  # of the JSON of a request

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequestError(Exception):
    """A request that is answered by an error, with a status of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class RequestLimits:
    """An ASGI application before another one: answers 400 to 413 itself, and passes on what is within the limits.

    With `api_key`, a request without it is refused before its body is read; without, one of a page in a browser that
    does not come from this machine. A request for another host than this machine is refused (DNS rebinding). A body may
    have `most_bytes`, and a token that it names be below `n_vocab`. `prepare` makes of a path and a request within the
    limits what is passed on, or raises RequestError.
    """

    def __init__(
        self,
        application: Application,
        *,
        api_key: str | None,
        most_bytes: int,
        n_vocab: int,
        prepare: Callable[[str, dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.application, self.api_key, self.prepare = application, api_key, prepare
        self.most_bytes, self.n_vocab = most_bytes, n_vocab

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            return
        try:
            self._check_head(scope)
            body = await self._read_body(scope, receive) if scope["method"] == "POST" else b""
            if scope["method"] == "POST":
                body = self._check_body(scope["path"], body)
        except RequestError as refused:
            await send_error(send, refused)
            return
        sent = False

        async def pass_on() -> MutableMapping[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        length = [(b"content-length", str(len(body)).encode())] if body else []
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        await self.application({**scope, "headers": [*headers, *length]}, pass_on, send)

    def _check_head(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if urlsplit(f"//{headers.get('host', '')}").hostname not in LOCAL:
            raise RequestError(403, "the server answers requests to 127.0.0.1 and localhost alone")
        path, method = scope["path"], scope["method"]
        if path not in PATHS:
            raise RequestError(404, f"no such address; there are {', '.join(PATHS)}")
        if method != PATHS[path]:
            raise RequestError(405, f"{path} takes {PATHS[path]}")
        if self.api_key is None:
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).hostname not in LOCAL:
                raise RequestError(403, "pages of other origins may not ask; set LATHE_API_KEY for those that may")
        elif not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {self.api_key}".encode()):
            raise RequestError(401, "the key is missing or wrong; send it as Authorization: Bearer KEY")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        too_large = RequestError(413, f"the body has more than {self.most_bytes} bytes; shorten it")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.most_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(SECONDS_FOR_A_BODY):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise RequestError(400, "the client is gone")
                    body += message.get("body", b"")
                    if len(body) > self.most_bytes:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise RequestError(408, f"the body took more than {SECONDS_FOR_A_BODY} s") from None

    def _check_body(self, path: str, body: bytes) -> bytes:
        """Return what is passed on, with schemas resolved, written anew; raise RequestError for what is not let in."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            problem = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
            raise RequestError(400, f"the body is no JSON: {problem}") from None
        if not isinstance(request, dict):
            raise RequestError(400, "the body is no request; expected an object")
        if _measure_depth(request) > DEEPEST:
            raise RequestError(400, f"the request is more than {DEEPEST} deep; make it flatter")
        content = "messages" if path == CHAT_PATH else "prompt"
        if not request.get(content):
            raise RequestError(400, f"{content}: is missing or empty")
        self._check_values(request)
        _resolve_schemas(request)
        try:
            return json.dumps(self.prepare(path, request), allow_nan=False).encode()
        except ValueError:
            raise RequestError(400, "the body has a number that is none: NaN or infinite") from None

    def _check_values(self, request: dict[str, Any]) -> None:
        if request.get("grammar") is not None:
            raise RequestError(400, "grammar: is not supported; use response_format with a JSON Schema")
        biases = request.get("logit_bias")
        if isinstance(biases, dict) and request.get("logit_bias_type") != "tokens":
            for token in biases:
                if not (token.isascii() and token.isdigit() and int(token) < self.n_vocab):
                    raise RequestError(
                        400, f"logit_bias: {token[:20]!r} is no token; must be from 0 to {self.n_vocab - 1}"
                    )
        stops = request.get("stop")
        stops = [stops] if isinstance(stops, str) else stops
        if isinstance(stops, list) and (
            len(stops) > MOST_STOPS or any(isinstance(stop, str) and len(stop) > LONGEST_STOP for stop in stops)
        ):
            raise RequestError(400, f"stop: at most {MOST_STOPS} texts of {LONGEST_STOP} characters")
        for key in ("logprobs", "top_logprobs"):
            value = request.get(key)
            if isinstance(value, int | float) and value > MOST_LOGPROBS:
                raise RequestError(400, f"{key}: {value} is too many; must be at most {MOST_LOGPROBS}")
        for key in ("n", "best_of"):
            if request.get(key) not in (None, 1):
                raise RequestError(400, f"{key}: one answer a request")


def _resolve_schemas(request: dict[str, Any]) -> None:
    """Resolve the references of every schema that an answer would be held to."""
    try:
        wanted = request.get("response_format")
        if isinstance(wanted, dict) and (schema := wanted.get("schema")) is not None:
            wanted["schema"] = resolve_schema(schema)
        nested = wanted.get("json_schema") if isinstance(wanted, dict) else None
        if isinstance(nested, dict) and (schema := nested.get("schema")) is not None:
            # As OpenAI writes it; llama-cpp-python looks for the schema beside the type.
            request["response_format"] = {"type": "json_object", "schema": resolve_schema(schema)}
        if isinstance(request.get("tool_choice"), dict):
            for tool in request.get("tools") or []:
                function = tool.get("function") if isinstance(tool, dict) else None
                if isinstance(function, dict) and isinstance(function.get("parameters"), dict):
                    function["parameters"] = resolve_schema(function["parameters"])
    except SchemaError as error:
        raise RequestError(400, str(error)) from None


def _measure_depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        depth += 1
        parts = [part for part in level if isinstance(part, dict | list)]
        level = [inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)]
    return depth


async def send_error(send: Send, refused: RequestError) -> None:
    """Answer in the form of OpenAI's errors."""
    kind = "authentication_error" if refused.status == 401 else "invalid_request_error"
    kind = "server_error" if refused.status >= 500 else kind
    content = json.dumps({"error": {"message": str(refused), "type": kind, "code": refused.status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    # What is left of a body is not read.
    headers.append((b"connection", b"close"))
    if refused.status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
