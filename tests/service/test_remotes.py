"""Clones that meet over an S3 server which checks signatures, and what is said when they cannot."""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from configobj import ConfigObj
from conftest import Checkout, copy_of
from s3_server import KEY, READER_KEY, READER_SECRET, REGION, SECRET, S3Server, s3_server

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.provenance import remotes

KEYS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
ENVIRONMENT = {**KEYS, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/no/config"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that nothing happens to."""
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for 127.0.0.1 that nobody but itself has signed, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    files = str(folder / "server.pem"), str(folder / "server.key")
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=s3")
    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run(
        ["openssl", "req", "-x509", *kind, *names, "-out", files[0], "-keyout", files[1]],
        check=True,
        capture_output=True,
    )
    return files


def client(server: S3Server) -> Any:
    """The keeper's own client, not DVC's."""
    from botocore.session import get_session

    return get_session().create_client(
        "s3",
        endpoint_url=server.url,
        region_name=REGION,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        verify=server.certificate[0] if server.certificate else None,
    )


def objects(server: S3Server, bucket: str) -> dict[str, bytes]:
    """Everything in a bucket."""
    asked = client(server)
    pages = asked.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {name: asked.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names}


def intact(server: S3Server, bucket: str) -> set[str]:
    """The hashes of what DVC keeps in a bucket, each computed anew from the content."""
    found = set()
    for name, content in objects(server, bucket).items():
        if "/files/md5/" in name:
            named = "".join(name.split("/")[-2:])
            assert hashlib.md5(content).hexdigest() == named.removesuffix(".dir"), name
            found.add(named)
    return found


@pytest.fixture
def repository(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository with this project's remotes, `ycloud` being the server's bucket `shared`, and its keys set."""
    root = tmp_path / "repository"
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    (root / ".dvc").mkdir()
    shutil.copy(paths.ROOT / ".dvc/config", root / ".dvc/config")
    configure(root, url="s3://shared/dvc", endpointurl=server.url)
    if "shared" not in [bucket["Name"] for bucket in client(server).list_buckets()["Buckets"]]:
        client(server).create_bucket(Bucket="shared", ACL="public-read")
    monkeypatch.setenv("HOME", str(root))  # no ~/.aws of whoever runs this
    for key in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REQUEST_CHECKSUM_CALCULATION"):
        monkeypatch.delenv(key, raising=False)
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    return root


def configure(root: Path, **settings: object) -> None:
    """Set what a user would set with `dvc remote modify --local ycloud`."""
    file = ConfigObj(str(root / ".dvc/config.local"))
    file.setdefault('remote "ycloud"', {}).update(settings)
    file.write()


def refusal(root: Path, name: str | None = "ycloud") -> str:
    """What `remote-check` says instead of ok, a line without a secret."""
    with pytest.raises(InputError) as refused:
        remotes.check_remote(root, name)
    text = str(refused.value)
    assert "\n" not in text
    assert not [secret for secret in (SECRET, READER_SECRET, KEY, READER_KEY, "wr0ng") if secret in text], text
    assert len(text) < 400
    return text


def test_a_remote_that_works_is_written_to_and_left_as_it_was(repository, server):
    assert "1,024 bytes written, listed, read back the same and deleted" in remotes.check_remote(repository, "ycloud")
    assert remotes.check_remote(repository, None).startswith(f"local ({repository}/.storage): 1,024 bytes")
    assert remotes.check_remote(repository, "YCloud")  # as DVC takes it
    assert objects(server, "shared") == {}
    assert list((repository / ".storage").iterdir()) == []


def test_credentials_in_the_local_configuration_do_as_well(repository, monkeypatch):
    for key in KEYS:
        monkeypatch.delenv(key)
    configure(repository, access_key_id=KEY, secret_access_key=SECRET)
    assert remotes.check_remote(repository, "ycloud")
    configure(repository, secret_access_key="wr0ng")
    assert "set access_key_id and secret_access_key in .dvc/config.local" in refusal(repository)


@pytest.mark.parametrize(
    ("environment", "settings", "said"),
    [
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            {},
            "no credentials; set AWS_ACCESS_KEY_ID and AWS_SE",
        ),
        ({"AWS_SECRET_ACCESS_KEY": ""}, {}, "half of the credentials is missing; set"),
        (
            {"AWS_ACCESS_KEY_ID": "wr0ng"},
            {},
            "the signature that they make is refused; set AWS_ACCESS_KEY_ID and AWS_SE",
        ),
        (
            {"AWS_SECRET_ACCESS_KEY": "wr0ng"},
            {},
            "the signature that they make is refused; set AWS_ACCESS_KEY_ID and AW",
        ),
        ({"AWS_SECRET_ACCESS_KEY": SECRET + " "}, {}, "the signature that they make is refused"),
        ({"AWS_PROFILE": "work"}, {}, "the profile is not in AWS's configuration; set AWS_PROFILE"),
        (
            {"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET},
            {},
            "may not write in the bucket shared; give the owner of the key the right",
        ),
        ({}, {"url": "s3://elsewhere/dvc"}, "the server has no bucket elsewhere; make it there, or `dvc remote modify"),
        (
            {},
            {"endpointurl": "http://127.0.0.1:1"},
            "nobody answers there; check the network and `dvc remote modify yclo",
        ),
        ({}, {"endpointurl": "http://no.such.host.invalid"}, "nobody answers there"),
        ({}, {"endpointurl": "127.0.0.1"}, "Invalid endpoint: 127.0.0.1; see `dvc remote modify --help`"),
        ({}, {"endpointurl": "https://{server}"}, "certificate is not trusted, or it speaks no TLS"),
        ({}, {"region": "no region"}, "the region"),
        ({}, {"no_such_setting": 1}, "extra keys not allowed"),
        ({}, {"read_timeout": "soon"}, "expected int"),
    ],
)
def test_what_is_wrong_with_a_remote_is_said_in_a_line(repository, server, monkeypatch, environment, settings, said):
    for key, value in environment.items():
        monkeypatch.setenv(key, value) if value else monkeypatch.delenv(key)
    address = server.url.removeprefix("http://")
    configure(repository, **{key: str(value).format(server=address) for key, value in settings.items()})
    assert said in refusal(repository)


def test_a_name_that_is_no_remote_is_told_the_near_one(repository):
    assert refusal(repository, "yclod") == "--remote yclod: no such remote in .dvc/config; did you mean 'ycloud'?"
    (repository / ".dvc/config").write_text("")
    assert refusal(repository, None).startswith("no remote is the default; give --remote NAME")


def test_a_folder_that_cannot_be_written_to_is_said_to_be_one(repository):
    (repository / ".storage").touch()
    assert "may not write there (Not a directory); make it a folder that this user can write to" in refusal(
        repository, "local"
    )


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server that has the same answer to every request."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "InvalidAccessKeyId", "does not know the access key"),
        (400, "ExpiredToken", "set AWS_SESSION_TOKEN to a new one"),
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong"),
        (
            400,
            "AuthorizationHeaderMalformed",
            "the region is not the bucket's; `dvc remote modify ycloud region REGION`",
        ),
        (400, "XAmzContentSHA256Mismatch", "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        (503, "SlowDown", "the server is busy or broken; try again later"),
        (409, "SomethingNew", "calling the PutObject operation: you sent [hidden]"),
        (501, "", "what answers there is no S3 server"),
        (200, "", "/object is left there; "),
    ],
)
def test_what_other_servers_answer_is_understood_too(repository, status, code, said):
    body = f"<Error><Code>{code}</Code><Message>you sent {SECRET}</Message></Error>" if code else "<html>hello</html>"
    with answering(status, body) as url:
        configure(repository, endpointurl=url)
        assert said in refusal(repository)


def test_a_server_that_says_nothing_or_hangs_up_does_not_hold_the_check(repository, monkeypatch):
    monkeypatch.setattr(remotes, "SECONDS_FOR_A_STEP", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        configure(repository, endpointurl=f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "takes connections and then says nothing" in refusal(repository)
        assert time.monotonic() - started < 25

        def hang_up() -> None:
            while True:
                silent.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setattr(remotes, "SECONDS_FOR_A_STEP", 30.0)
        # Which of them depends on whether the request was on its way by then.
        assert re.search("the server closed the connection|nobody answers there", refusal(repository))


def test_tls_is_checked_and_a_certificate_of_ones_own_can_be_named(repository, certificate, tmp_path):
    folder = tmp_path / "tls"
    folder.mkdir()
    with s3_server(folder, certificate) as secure:
        configure(repository, endpointurl=secure.url, url="s3://secure/dvc")
        assert "its TLS certificate is not trusted" in refusal(repository)
        configure(repository, ssl_verify=certificate[0])
        assert "the server has no bucket secure" in refusal(repository)
        client(secure).create_bucket(Bucket="secure")
        assert remotes.check_remote(repository, "ycloud")


def test_a_server_that_is_older_than_the_checksums_of_its_clients_needs_one_variable(
    repository, certificate, tmp_path, monkeypatch
):
    folder = tmp_path / "older"
    folder.mkdir()
    with s3_server(folder, certificate, takes_trailers=False) as older:
        configure(repository, endpointurl=older.url, url="s3://older/dvc", ssl_verify=certificate[0])
        client(older).create_bucket(Bucket="older")
        assert "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in refusal(repository)
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        assert remotes.check_remote(repository, "ycloud")


def test_the_command_prints_a_line_and_has_its_exit_code(repository, monkeypatch):
    def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lathe", "remote-check", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)

    shutil.copytree(paths.ROOT / "src", repository / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):  # what makes a folder a checkout of Lathe
        shutil.copy(paths.ROOT / name, repository / name)
    done = asked("--remote", "ycloud")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ycloud (s3://shared/dvc) at http://127.0.0.1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng")
    done = asked("--remote", "ycloud")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: ycloud .*the signature that they make is refused; set AWS.*\n", done.stderr)
    assert "wr0ng" not in done.stderr


def connected(checkout: Checkout, server: S3Server, bucket: str) -> Checkout:
    """Make the bucket the place of `ycloud`, and `ycloud` the default, as a user would."""
    configure(checkout.root, url=f"s3://{bucket}/dvc", endpointurl=server.url)
    checkout.run("dvc", "remote", "default", "--local", "ycloud")
    checkout.environment |= ENVIRONMENT
    return checkout


@pytest.fixture(scope="module")
def first(reproduced: Checkout, server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone that has run the pipeline and pushed what it made."""
    client(server).create_bucket(Bucket="team")
    checkout = connected(copy_of(reproduced, tmp_path_factory.mktemp("first") / "lathe"), server, "team")
    checkout.run("dvc", "push")
    return checkout


def clone_of(checkout: Checkout, root: Path) -> Checkout:
    """What a colleague has after `git clone` and a look at the remote's keys."""
    subprocess.run(["git", "clone", "--quiet", str(checkout.root), str(root)], check=True)
    shutil.copy(checkout.root / ".dvc/config.local", root / ".dvc/config.local")
    (root / ".llama.cpp").symlink_to(paths.LLAMA_CPP)
    clone = Checkout(root)
    clone.environment |= ENVIRONMENT
    clone.run("git", "config", "user.name", "Another User")
    clone.run("git", "config", "user.email", "another@example.invalid")
    return clone


# What `push: false` keeps at home.
RECOMPUTED = {"models/merged", "models/gguf/base-f16.gguf", "models/gguf/merged-f16.gguf"}


def outputs(checkout: Checkout) -> dict[str, dict[str, bytes]]:
    """Every file below each output of dvc.lock that DVC keeps, and that is pushed."""
    lock = yaml.safe_load((checkout.root / "dvc.lock").read_text())["stages"]
    listed = checkout.run("dvc", "stage", "list", "--all", "--name-only").stdout.split()
    kept = {out["path"] for name in listed if name in lock for out in lock[name]["outs"]} - RECOMPUTED
    contents = {}
    for out in sorted(path for path in kept if not path.startswith("metrics/")):
        files = [checkout.root / out, *(checkout.root / out).rglob("*")]
        contents[out] = {str(file.relative_to(checkout.root)): file.read_bytes() for file in files if file.is_file()}
    return contents


def test_what_one_clone_pushes_another_pulls(first, server, tmp_path):
    pushed = intact(server, "team")
    assert len(pushed) > 40
    second = clone_of(first, tmp_path / "second")
    second.run("dvc", "pull", "--allow-missing")
    assert outputs(second) == outputs(first)
    assert all(outputs(second).values())
    assert not [path for path in RECOMPUTED if (second.root / path).exists()]
    assert "Running stage" not in second.run("dvc", "repro", "--allow-missing").stdout
    assert first.run("dvc", "push").stdout == "Everything is up to date.\n"
    assert intact(server, "team") == pushed


def test_a_fresh_clone_with_its_inputs_has_nothing_to_run(first, tmp_path):
    second = clone_of(first, tmp_path / "second")
    second.run("dvc", "fetch", "data/local/few.jsonl")
    assert not (second.root / "data/local/few.jsonl").exists()
    second.run("dvc", "pull", "--recursive", "data/local", "models/local")
    done = second.run("dvc", "repro", "--pull", "--allow-missing").stdout
    assert "Running stage" not in done
    assert "Data and pipelines are up to date." in done
    assert second.run("git", "status", "--porcelain").stdout == ""


def test_an_experiment_goes_from_clone_to_clone_with_its_data(first, server, tmp_path):
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "hub.git")], check=True)
    working = copy_of(first, tmp_path / "working")
    working.environment |= ENVIRONMENT
    working.run("dvc", "exp", "run", "--name", "fewer", "--set-param", "evaluate.bootstrap_samples=200")
    working.run("git", "remote", "add", "hub", str(tmp_path / "hub.git"))
    working.run("git", "push", "--quiet", "hub", "main")
    before = intact(server, "team")
    working.run("dvc", "exp", "push", "--remote", "ycloud", "hub", "fewer")
    assert intact(server, "team") > before

    second = clone_of(first, tmp_path / "second")
    second.run("git", "remote", "add", "hub", str(tmp_path / "hub.git"))
    assert "fewer" in second.run("dvc", "exp", "list", "hub").stdout
    second.run("dvc", "exp", "pull", "--remote", "ycloud", "hub", "fewer")
    second.run("dvc", "exp", "branch", "fewer", "taken")
    second.run("git", "checkout", "--quiet", "taken")
    second.run("dvc", "checkout", "--allow-missing")
    assert outputs(second) == outputs(working)
    name = "metrics/evaluate/validation.json"
    assert second.json(name) == working.json(name) != first.json(name)


@pytest.mark.slow
def test_what_one_clone_has_run_is_not_run_in_another_that_has_no_lock_of_it(first, tmp_path):
    first.run("python", "-m", "lathe", "push-runs", env={"PYTHONPATH": str(first.root / "src")})
    second = clone_of(first, tmp_path / "second")
    (second.root / "dvc.lock").unlink()
    second.run("dvc", "pull", "--recursive", "data/local", "models/local")
    second.run("dvc", "fetch", "--run-cache")
    done = second.run("dvc", "repro", "--pull").stdout
    # What is not pushed is made anew, to the byte, or the runs behind it would not be found; verdicts have no run.
    assert set(re.findall(r"Running stage '(.*)'", done)) == {"merge", "convert_base", "convert_merged", "judge"}
    assert {"train", "quantize@Q8_0", "card"} <= set(re.findall(r"Stage '(.*)' is cached - skipping run", done))
    assert outputs(second) == outputs(first)


def test_wrong_credentials_leave_the_remote_alone_and_no_secret_in_what_dvc_says(first, server):
    before = objects(server, "team")
    wrong = {"AWS_SECRET_ACCESS_KEY": "wr0ng-secret"}
    for command in (["dvc", "push"], ["dvc", "pull"], ["dvc", "fetch"], ["dvc", "status", "--cloud"]):
        done = first.run(*command, check=False, env=wrong)
        if done.returncode:
            assert "wr0ng-secret" not in done.stdout + done.stderr
    done = first.run("dvc", "status", "--cloud", check=False, env=wrong)
    assert done.returncode != 0
    assert objects(server, "team") == before


def test_a_push_that_was_cut_off_is_finished_by_the_next_one(first, server, tmp_path):
    """The server is killed in the middle of a body; then it stalls there, and the push is killed."""
    folder = tmp_path / "s3"
    folder.mkdir()
    with s3_server(folder, at_upload=9) as shaky:
        client(shaky).create_bucket(Bucket="shaky")
        checkout = connected(copy_of(first, tmp_path / "pushing"), shaky, "shaky")
        assert checkout.run("dvc", "push", check=False).returncode != 0
        assert shaky.process
        assert shaky.process.wait(10) == -signal.SIGKILL
        shaky.start(at_upload=9, stop=signal.SIGSTOP)
        arrived = intact(shaky, "shaky")
        assert 0 < len(arrived) < 9

        environment = {**checkout.environment, **ENVIRONMENT}
        with subprocess.Popen(["dvc", "push", "--quiet"], cwd=checkout.root, env=environment) as push:
            wait_until_stopped(shaky.process.pid)
            push.kill()
        shaky.kill()
        shaky.start()
        assert intact(shaky, "shaky") >= arrived

        checkout.run("dvc", "push")
        assert arrived < intact(shaky, "shaky") <= intact(server, "team")
        second = clone_of(checkout, tmp_path / "second")
        second.run("dvc", "pull", "--allow-missing")
        assert outputs(second) == outputs(first)


def wait_until_stopped(process: int) -> None:
    """Wait for SIGSTOP to have come to a process."""
    until = time.monotonic() + 60
    while Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_collecting_garbage_leaves_what_the_workspace_uses(first, server, tmp_path):
    client(server).create_bucket(Bucket="tidy")
    checkout = connected(copy_of(first, tmp_path / "tidying"), server, "tidy")
    (checkout.root / "data/local/more.jsonl").write_text('{"ask": "more", "reply": "no"}\n')
    checkout.run("dvc", "add", "data/local/more.jsonl")
    checkout.run("dvc", "push")
    with_more = intact(server, "tidy")
    checkout.run("dvc", "remove", "data/local/more.jsonl.dvc")
    checkout.run("dvc", "gc", "--workspace", "--all-experiments", "--cloud", "--force")
    assert len(with_more - intact(server, "tidy")) == 1
    second = clone_of(checkout, tmp_path / "second")
    second.run("dvc", "pull", "--allow-missing")
    assert outputs(second) == outputs(first)
