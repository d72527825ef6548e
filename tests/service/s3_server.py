"""An S3 server that really checks who asks: OpenStack Swift with its S3 interface, whole, in one process.

Swift computes the signature of each request (AWS Signature Version 4) from the secret it knows, and compares region,
date and hash of the body with what was signed; users have rights. Its files lie in a folder that outlives the
process, so that a server can be killed and started again. Run as a program it is the server; `S3Server` starts that.

It is not Amazon's nor Yandex's: it has no roles, no session tokens and no policies, and does not tell an unknown key
from a wrong secret.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY, SECRET = "lathe:keeper", "the-keepers-secret-0123456789"
READER_KEY, READER_SECRET = "lathe:reader", "the-readers-secret-9876543210"
REGION = "ru-central1"

PROXY = f"""
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats bulk fault s3api tempauth copy slo symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:fault]
paste.filter_factory = s3_server:fault_factory
[filter:s3api]
use = egg:swift#s3api
location = {REGION}
[filter:tempauth]
use = egg:swift#tempauth
user_lathe_keeper = {SECRET} .admin
user_lathe_reader = {READER_SECRET}
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:symlink]
use = egg:swift#symlink
"""

STORE = """
[DEFAULT]
devices = {folder}/disks
mount_check = false
disable_fallocate = true
[pipeline:main]
pipeline = store
[app:store]
use = egg:swift#{kind}
"""

# What Yandex Object Storage answered in January 2025 to an upload with a checksum behind its body.
NO_TRAILERS = b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>XAmzContentSHA256Mismatch</Code>
<Message>The provided 'x-amz-content-sha256' header does not match what was computed.</Message></Error>"""


class S3Server:
    """The server's process; it keeps its port and its objects when it is started again."""

    def __init__(self, folder: Path, certificate: tuple[str, str] | None = None, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.certificate = certificate
        self.address = address
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self.certificate else 'http'}://{self.address}:{self.port}"

    def start(self, *, at_upload: int = 0, stop: signal.Signals = signal.SIGKILL, takes_trailers: bool = True) -> None:
        """Start it; `stop` hits it in the middle of the body of the upload of that number, counted from 1."""
        options = {
            "address": self.address,
            "port": self.port,
            "certificate": self.certificate,
            "at_upload": at_upload,
            "stop": int(stop),
            "takes_trailers": takes_trailers,
        }
        command = [sys.executable, __file__, str(self.folder), json.dumps(options)]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, (self.folder / "log").read_text()
        self.port = json.loads(line)["port"]

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        if self.process:
            self.process.kill()
            self.process.wait()


@contextmanager
def s3_server(
    folder: Path, certificate: tuple[str, str] | None = None, address: str = "127.0.0.1", **options: Any
) -> Iterator[S3Server]:
    """Run a server for as long as the block."""
    server = S3Server(folder, certificate, address)
    server.start(**options)
    try:
        yield server
    finally:
        server.kill()


class Fault:
    """What goes wrong: a signal while a body is read, or a server that is older than its clients."""

    def __init__(self, app: Any, options: dict[str, Any]) -> None:
        self.app, self.options, self.uploads = app, options, 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Serve one request."""
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].strip("/").count("/"):
            if not self.options["takes_trailers"] and "HTTP_X_AMZ_TRAILER" in environ:
                start_response("400 Bad Request", [("Content-Type", "application/xml")])
                return [NO_TRAILERS]
            self.uploads += 1
            if self.uploads == self.options["at_upload"]:
                environ["wsgi.input"].read(1)
                os.kill(os.getpid(), self.options["stop"])
        return self.app(environ, start_response)


def fault_factory(global_conf: dict[str, str], **_: str) -> Any:
    """Make the filter that the proxy's pipeline names."""
    return lambda app: Fault(app, json.loads(global_conf["options"]))


def serve(folder: Path, options: dict[str, Any]) -> None:
    """Listen, say in a line of JSON on which port, and go on until the process is ended."""
    import eventlet
    from eventlet import wsgi
    from swift.common import utils

    utils.eventlet_monkey_patch()
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = lathe\n")
    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    utils.validate_hash_conf()
    from swift.common.ring import RingBuilder
    from swift.common.wsgi import loadapp

    listening = {"proxy": eventlet.listen((options["address"], options["port"]))}
    (folder / "disks/disk").mkdir(parents=True, exist_ok=True)
    for kind in ("account", "container", "object"):
        listening[kind] = eventlet.listen(("127.0.0.1", 0))
        builder = RingBuilder(part_power=1, replicas=1, min_part_hours=0)
        where = {"ip": "127.0.0.1", "port": listening[kind].getsockname()[1], "device": "disk"}
        builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, **where})
        builder.rebalance(seed="lathe")
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))
    port = listening["proxy"].getsockname()[1]
    if options["certificate"]:
        certificate, key = options["certificate"]
        listening["proxy"] = eventlet.wrap_ssl(listening["proxy"], certfile=certificate, keyfile=key, server_side=True)
    for kind, listener in listening.items():
        configuration = folder / f"{kind}.conf"
        configuration.write_text(PROXY if kind == "proxy" else STORE.format(folder=folder, kind=kind))
        settings = {"swift_dir": str(folder), "options": json.dumps(options).replace("%", "%%")}
        app = loadapp(str(configuration), global_conf=settings)
        eventlet.spawn(wsgi.server, listener, app, log_output=False, debug=False)
    eventlet.sleep(0)
    print(json.dumps({"port": port}), flush=True)
    while True:
        eventlet.sleep(3600)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
