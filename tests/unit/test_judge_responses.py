"""A judge's server that answers without end, or with gigabytes, takes neither the memory nor the evening."""

import asyncio
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import psutil
import pytest

from lathe.common.http_session import HttpSession, HttpStatusError, MalformedError, UnavailableError
from lathe.evaluation.judge.providers.openai import sum_tokens


class Handler(BaseHTTPRequestHandler):
    """The path says how to answer."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(429 if self.path == "/later" else 200)
        if self.path == "/bomb":
            self.send_header("Content-Encoding", "gzip")
        if self.path == "/later":
            self.send_header("Retry-After", "Fri, 99 Dec 99999 23:59:59 GMT")
            self.send_header("Content-Length", "0")
        self.end_headers()
        try:
            if self.path == "/bomb":
                packer = zlib.compressobj(9, wbits=31)
                zeros = bytes(1 << 20)
                for _ in range(2048):
                    self.wfile.write(packer.compress(zeros))
            while self.path == "/endless":
                self.wfile.write(b"a" * (1 << 20))
            while self.path == "/drip":
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
            if self.path == "/packed":
                self.wfile.write(b'{"a": "\xc3\xa9"}')
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def post(server: str, path: str) -> object:
    async def run() -> object:
        session = HttpSession(
            server, key="judge.base_url", trust="judge.ca_bundle", certificates=None, timeout_seconds=1.0
        )
        try:
            return await session.post(path, {}, {})
        finally:
            await session.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/bomb", MalformedError, "longer than 8 MiB"),
        ("/endless", MalformedError, "longer than 8 MiB"),
        ("/drip", UnavailableError, "not ended its answer within 2 s"),
    ],
)
def test_an_answer_without_end_is_ended(server, path, error, message):
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(error, match=message):
        post(server, path)
    assert time.monotonic() - began < 60
    assert psutil.Process().memory_info().rss - before < 300e6


def test_an_ordinary_answer_is_read_whole(server):
    assert post(server, "/packed") == {"a": "é"}


def test_a_date_that_is_none_is_no_time_to_wait(server):
    with pytest.raises(HttpStatusError) as caught:
        post(server, "/later")
    assert caught.value.retry_after is None


def test_counts_of_tokens_that_nobody_counted_are_left_out():
    assert sum_tokens({"prompt_tokens": 10**30}, "prompt_tokens") is None
    assert sum_tokens({"prompt_tokens": 12}, "prompt_tokens") == 12
