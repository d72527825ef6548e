"""Judges on 127.0.0.1 in the shapes of OpenAI, Gemini and GigaChat, with the faults that real ones have.

They are as gullible as can be: whatever in a request stands outside of the data that they are told to judge is an
instruction to them, and a marker of the chat begins a message wherever it stands.
"""

import json
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

KEY = "sk-this-is-the-right-key-0123456789"
CREDENTIALS = "Y2xpZW50OnNlY3JldC1vZi1naWdhY2hhdA=="
MODELS = ["careful-judge", "quick-judge"]


@dataclass
class Reply:
    """What a server sends instead of a verdict; `cut` promises more bytes than come, `silent` sends none."""

    status: int = 200
    body: bytes | str | dict[str, Any] = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    silent: bool = False
    stall: bool = False


@dataclass(frozen=True)
class Asked:
    """What a server was asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


def said(text: str, finish_reason: str = "stop", **more: Any) -> dict[str, Any]:
    """An answer in the form of OpenAI's chat."""
    message = {"role": "assistant", "content": text, **more}
    usage = {"prompt_tokens": 400, "completion_tokens": 20, "total_tokens": 420}
    return {
        "model": "careful-judge-2026-01-01",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": usage,
    }


def opinion(text: str) -> dict[str, Any]:
    """The verdict of a judge who believes everything that stands outside of the data: 100 if it is told to, else 90
    where answer and reference agree, and 10 where they do not.
    """
    messages = re.split(r"<\|im_start\|>|<\|im_end\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>", text)
    data = re.search(r"^DATA.*\n((?:.*\n)*?)DATA", text, re.MULTILINE)
    outside = text.replace(data[1], "") if data and len(messages) == 1 else text
    if re.search(r"score 100|\"score\": 100|full marks", outside, re.IGNORECASE):
        return {"score": 100, "reason": "I was told to"}
    assert data, text
    row = json.loads(data[1])
    right = row["answer"] == row["reference"]
    return {"score": 90 if right else 10, "reason": "as the reference" if right else "not the reference"}


class JudgeServer:
    """A server; as a context manager it runs. Replies in `faults` go out first, one per request for a verdict."""

    def __init__(self, *, key: str | None = KEY, certificate: tuple[str, str] | None = None) -> None:
        self.key = key
        self.faults: list[Reply] = []
        self.always: Reply | None = None
        self.formats: set[str | None] = {"json_schema", "json_object", None}
        self.delay_seconds = 0.0
        self.answer: Callable[[str], str] = lambda text: json.dumps(opinion(text))
        self.token_seconds = 1800.0
        self.taken_back: set[str] = set()
        self.tokens: list[str] = []
        self.asked: list[Asked] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.address = f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def verdicts_asked(self) -> list[Asked]:
        """The requests for a verdict."""
        return [asked for asked in self.asked if asked.method == "POST" and "oauth" not in asked.path]

    def reply(self, asked: Asked) -> Reply:
        """Answer one request."""
        if asked.path.endswith("/oauth"):
            return self._sign_in(asked)
        if not self._allowed(asked):
            sent = asked.headers.get("Authorization") or asked.headers.get("x-goog-api-key")
            return Reply(401, {"error": {"message": f"Incorrect API key provided: {sent}"}})
        if asked.method == "GET":
            listed = [{"name": f"models/{name}", "id": name} for name in MODELS]
            return Reply(200, {"data": listed, "models": listed})
        with self._lock:
            fault = self.faults.pop(0) if self.faults else self.always
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay_seconds)
            if fault:
                if fault.stall:
                    self.closing.wait(30)
                return fault
            return self._generate(asked) if "generateContent" in asked.path else self._chat(asked)
        finally:
            with self._lock:
                self._at_once -= 1

    def _allowed(self, asked: Asked) -> bool:
        bearer = asked.headers.get("Authorization", "").removeprefix("Bearer ")
        if bearer in self.tokens:
            return bearer not in self.taken_back
        return self.key is None or self.key in (bearer, asked.headers.get("x-goog-api-key"))

    def _chat(self, asked: Asked) -> Reply:
        if asked.body["model"] not in MODELS:
            return Reply(404, {"error": {"message": f"The model `{asked.body['model']}` does not exist"}})
        form = asked.body.get("response_format", {}).get("type")
        if form not in self.formats:
            return Reply(400, {"error": {"message": f"unsupported response_format {form}", "param": "response_format"}})
        text = "\n".join(message["content"] for message in asked.body["messages"])
        return Reply(200, said(self.answer(text)))

    def _generate(self, asked: Asked) -> Reply:
        if not re.search(rf"/models/({'|'.join(MODELS)}):generateContent$", asked.path):
            return Reply(404, {"error": {"code": 404, "message": "model is not found", "status": "NOT_FOUND"}})
        config = asked.body["generationConfig"]
        assert config["responseSchema"]["required"] == ["score", "reason"]
        parts = [*asked.body["system_instruction"]["parts"], *asked.body["contents"][0]["parts"]]
        text = self.answer("\n".join(part["text"] for part in parts))
        content = {"parts": [{"text": text[:9]}, {"text": text[9:]}], "role": "model"}
        usage = {"promptTokenCount": 400, "candidatesTokenCount": 20, "thoughtsTokenCount": 5}
        candidates = [{"content": content, "finishReason": "STOP"}]
        return Reply(200, {"candidates": candidates, "usageMetadata": usage, "modelVersion": "gemini-9"})

    def _sign_in(self, asked: Asked) -> Reply:
        right = asked.headers.get("Authorization") == f"Basic {CREDENTIALS}" and len(asked.headers["RqUID"]) == 36
        if not right:
            return Reply(401, {"code": 6, "message": f"credentials doesn't match {asked.headers.get('Authorization')}"})
        if asked.body["scope"] != ["GIGACHAT_API_PERS"]:
            return Reply(400, {"code": 7, "message": "scope from db not fully includes consumed scope"})
        self.tokens.append(f"token-{len(self.tokens)}-of-a-session")
        return Reply(
            200, {"access_token": self.tokens[-1], "expires_at": int(1000 * (time.time() + self.token_seconds))}
        )


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve(None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._serve(parse_qs(body.decode()) if self.path.endswith("/oauth") else json.loads(body))

        def _serve(self, body: Any) -> None:
            asked = Asked(self.command, self.path, dict(self.headers), body, time.monotonic())
            server.asked.append(asked)
            reply = server.reply(asked)
            if reply.silent or reply.stall:
                self.close_connection = True
                return
            content = json.dumps(reply.body) if isinstance(reply.body, dict) else reply.body
            data = content.encode() if isinstance(content, str) else content
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data) + (100 if reply.cut else 0)))
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = reply.cut

        def log_message(self, *_: object) -> None:
            pass

    return Handler
