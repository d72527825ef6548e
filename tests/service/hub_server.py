"""A model hub on 127.0.0.1 that the real client talks to, with the faults that a real one has.

It takes uploads too: repositories are created, large files sent by LFS and checked, the others with the commit. It
speaks what `huggingface_hub` needs: repository information, paged listings, `resolve` with HEAD and GET, ETags, a
redirect on the same host for small files, and for large ones a redirect to a second server under another host name, as
a CDN, that serves ranges.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 4  # entries in one page of a listing
GOOD_TOKEN = "hf_this_token_may_read_everything"
WRITING_TOKEN = "hf_this_token_may_write_too"


@dataclass
class Repository:
    """Commits, and the names that point to them."""

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    granted: bool = False  # to the account of the good token
    announced_sizes: dict[str, int] = field(default_factory=dict)
    announced_hashes: dict[str, str] = field(default_factory=dict)
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)  # the metadata of its README

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit of exactly these files, let `ref` point to it and return its hash."""
        listing = json.dumps([len(self.commits), sorted((path, digest(data)) for path, data in files.items())])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha


@dataclass
class Fault:
    """What happens to requests whose `METHOD path` matches; `times` such requests, then no more."""

    pattern: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection is closed
    stall_after: int | None = None  # bytes of the body, then nothing more comes
    corrupt: bool = False
    endless: bool = False  # the body comes again and again
    times: int = 1_000


@dataclass(frozen=True)
class Request:
    """What a server was asked."""

    server: str
    line: str
    headers: dict[str, str]


class Hub:
    """The two servers; as a context manager they run."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self.closing = threading.Event()
        self._hub = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, "hub"))
        self._cdn = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, "cdn"))
        self.endpoint = f"http://127.0.0.1:{self._hub.server_port}"
        self.cdn = f"http://localhost:{self._cdn.server_port}"

    def __enter__(self) -> "Hub":
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> Repository:
        """Add a repository whose main branch is one commit of these files."""
        repository = self.repositories[kind, name] = Repository(kind, name)
        repository.commit(files)
        return repository

    def asked(self, pattern: str) -> list[Request]:
        """Return the requests whose `METHOD path` matches."""
        return [request for request in self.requests if re.search(pattern, request.line)]


def is_large(path: str) -> bool:
    """Tell whether the hub keeps a file as LFS does: known by its SHA-256, served by the CDN."""
    return path.endswith((".safetensors", ".parquet", ".bin", ".gguf", "tokenizer.json"))


def digest(data: bytes) -> str:
    """Return the hash that Git knows a file by."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: Hub, server: str) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub, Handler.server_kind = hub, server
    return Handler


class _RefusedError(Exception):
    def __init__(self, status: int, code: str | None, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    server_kind: str
    protocol_version = "HTTP/1.1"
    body = b""

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def do_PUT(self) -> None:
        self.do_POST()

    def _answer(self) -> None:
        line = f"{self.command} {self.path}"
        self.hub.requests.append(Request(self.server_kind, line, {k.lower(): v for k, v in self.headers.items()}))
        fault = next((each for each in self.hub.faults if each.times and re.search(each.pattern, line)), None)
        if fault:
            fault.times -= 1
            if fault.status:
                self._send(fault.status, b'{"error": "made to fail"}', fault.headers)
                return
        try:
            status, body, headers = self._cdn() if self.server_kind == "cdn" else self._hub()
        except _RefusedError as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)
            return
        if fault and fault.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        self._send(status, body, headers, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        length = {} if fault and fault.endless else {"Content-Length": str(len(body))}
        for name, value in (length | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = (fault.cut_after or fault.stall_after) if fault else None
        self.wfile.write(body[:end])
        while fault and fault.endless and not self.hub.closing.is_set():
            try:
                self.wfile.write(body)
            except OSError:
                return
        if fault and fault.stall_after:
            self.hub.closing.wait(60)
        self.close_connection = bool(end)

    def _cdn(self) -> tuple[int, bytes, dict[str, str]]:
        if self.command == "PUT":
            name = urlsplit(self.path).path.strip("/")
            if hashlib.sha256(self.body).hexdigest() != name:
                raise _RefusedError(400, None, "The content has another hash")
            self.hub.blobs[name] = self.body
            return 200, b"", {}
        body = self.hub.blobs[urlsplit(self.path).path.strip("/")]
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            return 206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        return 200, body, {}

    def _hub(self) -> tuple[int, bytes, dict[str, str]]:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (GOOD_TOKEN, WRITING_TOKEN):
            raise _RefusedError(401, None, f"Invalid credentials in Authorization header: {token}")
        if self.command == "POST":
            return self._write(url.path, token)
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/([^/]+))?", url.path):
            repository, commit = self._find(match[1], match[2], match[3], token)
            return 200, json.dumps(_information(repository, commit)).encode(), {"Content-Type": "application/json"}
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/([^/]+)/?", url.path):
            repository, commit = self._find(match[1], match[2], match[3], token)
            return self._page(list(_entries(repository, commit)), int(parse_qs(url.query).get("cursor", ["0"])[0]))
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            return self._resolve(*self._find("dataset" if match[1] else "model", match[2], match[3], token), match[4])
        if match := re.fullmatch(r"/api/resolve-cache/(model|dataset)s/([^/]+/[^/]+)/([^/]+)/(.+)", url.path):
            repository, commit = self._find(match[1], match[2], match[3], token)
            body = repository.commits[commit][unquote(match[4])]
            return 200, body, {"X-Repo-Commit": commit, "ETag": f'"{digest(body)}"'}
        raise _RefusedError(404, None, "Not found")

    def _write(self, path: str, token: str) -> tuple[int, bytes, dict[str, str]]:
        """Answer the requests of an upload, with their bodies in JSON."""
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            repository, commit = self._find(match[1], match[2], match[3], token)
            wanted = set(parse_qs(self.body.decode())["paths"])
            return _as_json([entry for entry in _entries(repository, commit) if entry["path"] in wanted])
        if token != WRITING_TOKEN:
            raise _RefusedError(403, None, "You don't have the rights to write there")
        if path == "/api/validate-yaml":
            return _as_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{self.hub.endpoint}/{name}"}
            if ("model", name) in self.hub.repositories:
                return 409, json.dumps({"error": "You already created this model repo", **url}).encode(), {}
            self.hub.add("model", name, {".gitattributes": b"*.gguf filter=lfs\n"})
            self.hub.repositories["model", name].private = asked.get("visibility") == "private"
            return _as_json(url)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self._find("model", match[1], "main", token)
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            return _as_json({"files": files})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return _as_json(
                {"transfer": "basic", "objects": list(map(self._offer_upload, json.loads(self.body)["objects"]))}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(*self._find("model", match[1], "main", token))
        raise _RefusedError(404, None, "Not found")

    def _offer_upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.hub.blobs:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.hub.cdn}/{asked['oid']}?signature=secret"}}}

    def _commit(self, repository: Repository, parent: str) -> tuple[int, bytes, dict[str, str]]:
        files = dict(repository.commits[parent])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _RefusedError(400, None, f"{value['path']}: no such LFS object")
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repository.commit(files)
        url = f"{self.hub.endpoint}/{repository.name}/commit/{sha}"
        return _as_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _find(self, kind: str, name: str, revision: str | None, token: str) -> tuple[Repository, str]:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            if token:
                raise _RefusedError(404, "RepoNotFound", "Repository not found")
            raise _RefusedError(401, None, "Invalid username or password.")
        revision = unquote(revision or "main")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _resolve(self, repository: Repository, commit: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        token = "Authorization" in self.headers
        if repository.gated and not (token and repository.granted):
            raise _RefusedError(403 if token else 401, "GatedRepo", f"Access to {repository.name} is restricted")
        body = repository.commits[commit].get(unquote(path))
        if body is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(body)}"'}
        if not is_large(path):
            return (
                307,
                b"",
                headers | {"Location": f"/api/resolve-cache/{repository.kind}s/{repository.name}/{commit}/{path}"},
            )
        sha = hashlib.sha256(body).hexdigest()
        self.hub.blobs[sha] = body
        linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(body))}
        return 302, b"", headers | linked | {"Location": f"{self.hub.cdn}/{sha}?signature=secret"}

    def _page(self, entries: list[dict[str, Any]], start: int) -> tuple[int, bytes, dict[str, str]]:
        headers = {"Content-Type": "application/json"}
        if start + PAGE < len(entries):
            path = urlsplit(self.path).path
            headers["Link"] = f'<{self.hub.endpoint}{path}?recursive=True&cursor={start + PAGE}>; rel="next"'
        return 200, json.dumps(entries[start : start + PAGE]).encode(), headers


def _as_json(content: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}


def _information(repository: Repository, commit: str) -> dict[str, Any]:
    return {
        "_id": "0" * 24,
        "id": repository.name,
        "author": repository.name.split("/")[0],
        "sha": commit,
        "lastModified": "2025-01-01T00:00:00.000Z",
        "createdAt": "2025-01-01T00:00:00.000Z",
        "private": repository.private,
        "cardData": repository.card,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in repository.commits[commit]],
    }


def _entries(repository: Repository, commit: str) -> Iterator[dict[str, Any]]:
    for path, data in sorted(repository.commits[commit].items()):
        size = repository.announced_sizes.get(path, len(data))
        named = repository.announced_hashes.get(path)
        entry: dict[str, Any] = {"type": "file", "oid": named or digest(data), "size": size, "path": path}
        if is_large(path):
            entry["lfs"] = {"oid": named or hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
        yield entry
