"""The studio's guard: who is answered, from where, and what is refused or survived."""

import asyncio
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Checkout, make_checkout
from starlette.exceptions import HTTPException
from studio_server import TOKEN, Studio

from lathe.studio.security import COOKIE, Guard, Session, list_hosts


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("studio") / "lathe")


@pytest.fixture(scope="module")
def studio(checkout: Checkout) -> Iterator[Studio]:
    with Studio(checkout.root) as studio:
        studio.open()
        yield studio


ADDRESSES = ["/", "/new", "/api/runs", "/api/openapi.json", "/static/studio.js", "/static/vendor/vega.min.js", "/none"]


@pytest.mark.parametrize("path", ADDRESSES)
def test_without_the_cookie_nothing_is_answered(studio, path):
    for cookie in ("", "lathe_studio=", "lathe_studio=wrong", "lathe_studio=é", "other=1"):
        answer = studio.ask("GET", path, cookie=cookie.encode("utf-8").decode("latin-1"))
        assert answer.status == 401
        assert answer.json()["code"] == "no-session"


def test_the_link_opens_one_browser_and_no_second(studio):
    for token in (studio.link_token, "", "x" * 50):
        assert studio.ask("GET", f"/open?token={token}", cookie="").status == 401


def test_the_cookie_is_kept_from_scripts_and_other_sites(checkout):
    with Studio(checkout.root) as studio:
        given = studio.ask("GET", f"/open?token={studio.link_token}", cookie="").headers["set-cookie"]
    assert "HttpOnly" in given
    assert "SameSite=Strict" in given


@pytest.mark.parametrize("host", ["evil.invalid", "127.0.0.1", "127.0.0.1:1", "evil.invalid:{port}", "0.0.0.0:{port}"])
def test_a_name_that_an_attacker_points_here_is_refused(studio, host):
    answer = studio.ask("GET", "/", headers={"Host": host.format(port=studio.port)})
    assert answer.status == 403
    assert answer.json()["code"] == "foreign-host"


def test_localhost_is_the_studio_too(studio):
    assert studio.ask("GET", "/", headers={"Host": f"localhost:{studio.port}"}).status == 200


@pytest.mark.parametrize("origin", ["http://evil.invalid", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_origin_is_refused(studio, origin, method):
    headers = {"Origin": origin.format(port=studio.port)}
    answer = studio.ask(method, "/quick-start", {} if method == "POST" else None, headers)
    assert answer.status == 403
    assert answer.json()["code"] == "foreign-origin"


def test_a_request_of_another_site_is_refused_by_what_the_browser_says_of_it(studio):
    assert studio.ask("GET", "/", headers={"Sec-Fetch-Site": "cross-site"}).status == 403


@pytest.mark.parametrize("path", ["/quick-start", "/new/start", "/report", "/api/fine-tuning", "/api/runs"])
def test_whatever_changes_something_needs_the_csrf_token(studio, path):
    for headers in ({}, {"X-CSRF-Token": "wrong"}, {"X-CSRF-Token": ""}):
        answer = studio.ask("POST", path, {}, headers, csrf=False)
        assert answer.status == 403
        assert answer.json()["code"] == "no-csrf-token"


def test_a_program_needs_its_token_and_gets_the_api_alone(studio):
    assert studio.api("GET", "/api/recipes").status == 200
    assert studio.ask("GET", "/api/recipes", headers={"Authorization": "Bearer wrong"}, cookie="").status == 401
    assert studio.ask("GET", "/", headers={"Authorization": f"Bearer {TOKEN}"}, cookie="").status == 401


def test_a_short_token_for_programs_is_refused(checkout):
    environment = {"PYTHONPATH": str(checkout.root / "src"), "LATHE_STUDIO_TOKEN": "short"}
    done = checkout.run("python3", "-m", "lathe", "studio", "--port", "0", check=False, env=environment)
    assert done.returncode == 2
    assert "LATHE_STUDIO_TOKEN has 5 characters" in done.stderr


def test_a_number_that_is_no_port_is_refused(checkout):
    environment = {"PYTHONPATH": str(checkout.root / "src")}
    done = checkout.run("python3", "-m", "lathe", "studio", "--port", "99999", check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: --port 99999: no port; must be from 0 (any free one) to 65535\n"


@pytest.mark.parametrize("path", ["/", "/new", "/data", "/static/studio.js", "/none", "/open?token=x"])
def test_no_page_may_run_inline_scripts_or_ask_another_host(studio, path):
    policy = studio.ask("GET", path).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", ["/", "/new", "/searches", "/data", "/compare", "/chat", "/lineage", "/judge"])
def test_pages_have_neither_inline_scripts_nor_styles(studio, path):
    text = studio.ask("GET", path).text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
    assert not re.search(r"(src|href|action)=\"(https?:)?//", text)


PATHS = ["../../etc/passwd", "/etc/passwd", "data/local/../../params.yaml", "data/local/out", "%2e%2e/secret", "a\0b"]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leaves_the_checkout(studio, path):
    link = studio.root / "data/local/out"
    if not link.is_symlink():
        os.symlink("/etc/passwd", link)
    from urllib.parse import quote

    answers = [
        studio.ask("GET", f"/api/data/check?path={quote(path)}"),
        studio.ask("GET", f"/lineage?file={quote(path)}"),
        studio.ask("GET", f"/static/{quote(path, safe='')}"),
        studio.ask("PUT", f"/api/data/{quote(path, safe='')}", b"x"),
    ]
    link.unlink()
    for answer in answers:
        assert answer.status in (404, 405, 422), answer.text
        assert "root:" not in answer.text


def test_an_upload_that_is_too_large_is_refused_and_leaves_nothing(studio):
    told = studio.ask("PUT", "/api/data/big.jsonl", headers={"Content-Length": "1200000"})
    assert told.status == 413
    with socket.create_connection(("127.0.0.1", studio.port), timeout=30) as sender:
        head = f"PUT /api/data/big.jsonl HTTP/1.1\r\nHost: 127.0.0.1:{studio.port}\r\nCookie: {studio.cookie}\r\n"
        sender.sendall(f"{head}X-CSRF-Token: {studio.csrf}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(60):  # its length is not told
                sender.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
            answered = sender.recv(100)
        except OSError:  # closed while the rest was being sent
            answered = b""
    assert not answered or b" 413 " in answered
    deadline = time.monotonic() + 5
    while (left := list((studio.root / "data/local").glob("*big*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def test_another_request_may_not_be_as_large_as_an_upload(studio):
    assert studio.ask("POST", "/new/check", headers={"Content-Length": "2100000"}).status == 413
    assert studio.ask("POST", "/new/check", b"x", {"Content-Length": "-5"}).status in (400, 413)


def test_two_hundred_slow_connections_keep_nobody_from_an_answer_and_are_closed(studio):
    slow = []
    for _ in range(200):
        sender = socket.create_connection(("127.0.0.1", studio.port), timeout=30)
        sender.sendall(b"GET / HTTP/1.1\r\nHost: ")
        slow.append(sender)
    begun = time.monotonic()
    assert studio.ask("GET", "/api/recipes").status == 200
    assert time.monotonic() - begun < 5
    assert all(sender.recv(1) == b"" for sender in slow)
    assert time.monotonic() - begun < 25
    for sender in slow:
        sender.close()


def test_a_body_that_stands_still_is_given_up_and_a_stream_of_events_is_not():
    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/events":
            await asyncio.sleep(0.3)  # longer than a body may stand still
            received = asyncio.ensure_future(receive())
            await asyncio.sleep(0.3)
            assert not received.done()
            received.cancel()
        else:
            await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def wait(*_: Any) -> Any:
        await asyncio.sleep(60)

    session = Session(list_hosts(1), TOKEN)
    guard = Guard(application, session, seconds_to_send=0.1)
    headers = [(b"host", b"127.0.0.1:1"), (b"authorization", f"Bearer {TOKEN}".encode())]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/api/events", "headers": headers, "query_string": b""}
    asyncio.run(guard({**scope, "path": "/events", "headers": _with_cookie(session)}, wait, send))
    assert sent[0]["status"] == 200
    with pytest.raises(HTTPException) as caught:
        asyncio.run(guard({**scope, "headers": [*headers, (b"content-length", b"5")]}, wait, send))
    assert caught.value.status_code == 408


def _with_cookie(session: Session) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"127.0.0.1:1"), (b"cookie", f"{COOKIE}={session.secret}".encode())]


def test_the_token_of_the_link_is_in_no_log(studio):
    assert studio.process.poll() is None
    with Studio(studio.root) as other:
        other.open()
        other.process.terminate()
        _, log = other.process.communicate(timeout=20)
    assert other.link_token not in log
    assert TOKEN not in log
