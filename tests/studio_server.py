"""A studio that a test starts in a checkout, and requests to it by plain sockets and urllib."""

import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

TOKEN = "a-token-of-the-tests-0123456789"


class Studio:
    """The process, its link, and after `open` its cookie."""

    def __init__(self, root: Path, environment: dict[str, str] | None = None) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lathe", "studio", "--port", "0", "--no-browser", "--largest-upload", "1"],
            cwd=root,
            env={
                **os.environ,
                "PYTHONPATH": str(root / "src"),
                "LATHE_STUDIO_TOKEN": TOKEN,
                "HF_HUB_OFFLINE": "1",
                "GIT_CONFIG_GLOBAL": os.devnull,
                **(environment or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.link = self.process.stdout.readline().strip()
        match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/open\?token=(\S+)", self.link)
        assert match, self.process.stderr and self.process.stderr.read()
        self.port, self.link_token = int(match[1]), match[2]
        self.cookie = ""
        self.csrf = ""

    def __enter__(self) -> "Studio":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Take the link, as a browser does."""
        answer = self.ask("GET", f"/open?token={self.link_token}", cookie="")
        assert answer.status == 200, answer.text
        self.cookie = answer.headers["set-cookie"].partition(";")[0]
        match = re.search(r'name="csrf-token" content="([0-9a-f]+)"', self.ask("GET", "/").text)
        assert match
        self.csrf = match[1]

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        cookie: str | None = None,
        csrf: bool = True,
    ) -> "Answer":
        """Send a request as the page would; what is given replaces its headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        sent = {"Cookie": self.cookie if cookie is None else cookie}
        if csrf and self.csrf:
            sent["X-CSRF-Token"] = self.csrf
        if isinstance(body, dict):
            body = urllib.parse.urlencode(body)
            sent |= {"Content-Type": "application/x-www-form-urlencoded", "HX-Request": "true"}
        connection.request(method, path, body, {**sent, **(headers or {})})
        response = connection.getresponse()
        answer = Answer(response.status, dict(response.getheaders()), response.read().decode(errors="replace"))
        connection.close()
        return answer

    def api(self, method: str, path: str, content: Any = None) -> "Answer":
        """Send a request as a program would, with the token."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        body = None if content is None else json.dumps(content)
        return self.ask(method, path, body, headers, cookie="", csrf=False)

    def wait(self, identifier: str, seconds: float = 240) -> dict[str, Any]:
        """Wait for the end of a command that was started."""
        for _ in range(int(seconds * 4)):
            command: dict[str, Any] = self.api("GET", f"/api/commands/{identifier}").json()
            if command["state"] != "running":
                return command
            time.sleep(0.25)
        raise AssertionError(f"{command} still runs")


class Answer:
    """Status, headers in lower case, and text of a response."""

    def __init__(self, status: int, headers: dict[str, str], text: str) -> None:
        self.status, self.text = status, text
        self.headers = {name.lower(): value for name, value in headers.items()}

    def json(self) -> Any:
        return json.loads(self.text)
