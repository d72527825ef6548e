"""A server of OpenAI's completions on 127.0.0.1, which knows its answers, with the faults that real ones have."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-served-0123456789"
MODEL = "merged"


class AnswerServer:
    """A server; as a context manager it runs. `read` counts the tokens of a prompt, `answer` answers its text.

    `faults` go out first, one per request: a status with a body, bytes in place of JSON, or None for silence.
    """

    def __init__(self, read: Callable[[Any], int], answer: Callable[[Any], dict[str, Any]]) -> None:
        self.read, self.answer = read, answer
        self.key: str | None = None
        self.faults: list[tuple[int, bytes] | bytes | None] = []
        self.takes_tokens = self.takes_extensions = True
        self.models: list[dict[str, Any]] | None = [{"id": MODEL, "owned_by": "vllm"}]
        self.delay_seconds = 0.0
        self.asked: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.most_at_once = self._at_once = 0
        self._lock, self.closing = threading.Lock(), threading.Event()
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "AnswerServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def reply(self, body: dict[str, Any]) -> tuple[int, bytes] | None:
        """Answer one request for a completion."""
        with self._lock:
            self.asked.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults.pop(0) if self.faults else b""
        try:
            time.sleep(self.delay_seconds)
            if fault is None:
                self.closing.wait(30)
                return None
            if fault:
                return fault if isinstance(fault, tuple) else (200, fault)
            if not self.takes_tokens and not isinstance(body["prompt"], str):
                return 422, b'{"detail": "prompt must be a string"}'
            if not self.takes_extensions and "stop_token_ids" in body:
                return 400, b'{"error": {"message": "Unrecognized request argument: stop_token_ids"}}'
            choice = {"index": 0, "text": "", "finish_reason": "stop", **self.answer(body)}
            usage = {"prompt_tokens": self.read(body["prompt"]), **choice.pop("usage", {})}
            return 200, json.dumps({"model": body["model"], "choices": [choice], "usage": usage}).encode()
        finally:
            with self._lock:
                self._at_once -= 1


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing: the client has hung up."""


def _handler(server: AnswerServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/v1/models" and server.models is not None:
                self._send(200, json.dumps({"data": server.models}).encode())
            else:
                self._send(404, b"not here")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._is_allowed():
                return self._send(401, json.dumps({"error": f"no such key: {self.headers['Authorization']}"}).encode())
            if (reply := server.reply(body)) is None:
                self.close_connection = True
            else:
                self._send(*reply)
            return None

        def _is_allowed(self) -> bool:
            server.authorizations.append(self.headers["Authorization"])
            return server.key is None or self.headers["Authorization"] == f"Bearer {server.key}"

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
