"""DVC's remotes: who they are, where their keys come from, and `python -m lathe remote-check`.

The check goes the way of `dvc push`: DVC's own file system of the remote, with DVC's configuration and credentials.
What S3 or its client answers is a screen of text that may hold the request; here it becomes one line without a secret.

Only the standard library is imported at the top: `python -m lathe doctor` asks too.
"""

import os
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError

if TYPE_CHECKING:
    from dvc.repo import Repo

SECONDS_FOR_A_CONNECTION = 2.0

# What a check waits for each step. The client's own timeouts do not end every wait: one for `100 Continue` has no end.
SECONDS_FOR_A_STEP = 30.0

OBJECT_BYTES = 1024

SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SECRET_SETTINGS = ("access_key_id", "secret_access_key", "session_token", "password", "passphrase", "client_secret")

# What S3 answers, and what is to be done; {step} is what was tried, {name} the remote, {bucket} its bucket.
WRONG_KEY = (
    "the access key and its secret do not belong together: the signature that they make is refused",
    "set {keys} to a pair that belongs together, no space around",
)
WRONG_REGION = (
    "the region is not the bucket's",
    "`dvc remote modify {name} region REGION`",
)
NO_CHECKSUMS = (
    "the server does not take the checksums that the client sends with an upload",
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
)
BUSY = ("the server is busy or broken", "try again later")
NOT_ALLOWED = (
    "may not {step} in the bucket {bucket}",
    "give the owner of the key the right to, or set {keys} to another's",
)
NO_S3 = ("what answers there is no S3 server", "`dvc remote modify {name} endpointurl URL`")
NOBODY = ("nobody answers there", "check the network and `dvc remote modify {name} endpointurl URL`")
SILENT = ("the server takes connections and then says nothing", "try again later, and check the endpointurl")
EXPIRED = ("the session token is wrong or too old", "set AWS_SESSION_TOKEN to a new one, or unset it")
ANSWERS = {
    "SignatureDoesNotMatch": WRONG_KEY,
    "InvalidAccessKeyId": ("the server does not know the access key", "set {keys} to a pair that it knows"),
    "InvalidToken": EXPIRED,
    "ExpiredToken": EXPIRED,
    "NoSuchBucket": (
        "the server has no bucket {bucket}",
        "make it there, or `dvc remote modify {name} url s3://BUCKET/PATH`",
    ),
    "InvalidBucketName": ("{bucket} is no name for a bucket", "`dvc remote modify {name} url s3://BUCKET/PATH`"),
    "AccessDenied": NOT_ALLOWED,
    "AllAccessDisabled": NOT_ALLOWED,
    "403": NOT_ALLOWED,
    "AuthorizationHeaderMalformed": WRONG_REGION,
    "IllegalLocationConstraintException": WRONG_REGION,
    "PermanentRedirect": WRONG_REGION,
    "301": WRONG_REGION,
    "RequestTimeTooSkewed": ("the clock of this machine is wrong", "set it"),
    "XAmzContentSHA256Mismatch": NO_CHECKSUMS,
    "NotImplemented": NO_CHECKSUMS,
    "SlowDown": BUSY,
    "ServiceUnavailable": BUSY,
    "InternalError": BUSY,
    "500": BUSY,
    "502": BUSY,
    "503": BUSY,
    "504": BUSY,
}

# What the client says before, or instead of, an answer; by the names of botocore's exceptions.
SILENCES = {
    "NoCredentialsError": ("no credentials", "set {keys}"),
    "PartialCredentialsError": ("half of the credentials is missing", "set {keys}, both"),
    "ProfileNotFound": (
        "the profile is not in AWS's configuration",
        "set AWS_PROFILE or the remote's `profile` to one that is there, or unset it",
    ),
    "SSLError": (
        "its TLS certificate is not trusted, or it speaks no TLS",
        "`dvc remote modify {name} ssl_verify CA.pem`, or http:// in its endpointurl",
    ),
    "EndpointConnectionError": NOBODY,
    "ProxyConnectionError": ("the proxy does not answer", "check HTTPS_PROXY and HTTP_PROXY"),
    "ConnectTimeoutError": NOBODY,
    "ReadTimeoutError": SILENT,
    "TimeoutError": SILENT,
    "ConnectionClosedError": ("the server closed the connection", "try again later, and check the endpointurl"),
    "ResponseParserError": NO_S3,
    "InvalidRegionError": WRONG_REGION,
    "NoRegionError": WRONG_REGION,
}


def shown(name: str, remote: Mapping[str, Any]) -> str:
    """Name a remote and its place, without what the address may hold of user and password."""
    url = urllib.parse.urlsplit(str(remote["url"]))
    return f"{name} ({url.scheme}://{url.hostname or ''}{url.path})" if url.scheme else f"{name} ({url.path})"


def endpoint(remote: Mapping[str, Any]) -> str:
    """Return the address that an S3 remote's requests go to."""
    return str(remote.get("endpointurl") or "https://s3.amazonaws.com")


def has_credentials(remote: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Return whether an S3 client would find a key: in the environment, the remote's settings, or AWS's files."""
    return bool(
        {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {key for key, value in environment.items() if value}
        or environment.get("AWS_PROFILE")
        or {"access_key_id", "profile", "credentialpath"} & set(remote)
        or Path("~/.aws/credentials").expanduser().exists()
    )


def connect(url: str) -> None:
    """Open a connection and close it; raise OSError if nobody answers soon. Behind a proxy nothing is tried."""
    there = urllib.parse.urlsplit(url)
    if there.scheme in urllib.request.getproxies():
        return
    address = there.hostname or "", there.port or (80 if there.scheme == "http" else 443)
    try:
        socket.create_connection(address, timeout=SECONDS_FOR_A_CONNECTION).close()
    except OSError as error:
        raise OSError(f"{address[0]}:{address[1]} does not answer ({error.strerror or error})") from None


def check(root: Path, name: str | None) -> str:
    """Write an object to the remote, find it, read it back, compare and delete it; return what was done, in a line.

    `name` is one of the remotes of the checkout at `root`; None: the default one. Raises InputError with one line.
    """
    with opened(root, name) as (repo, found, settings):
        remote = repo.cloud.get_remote(found)
        return _tried(remote.fs, remote.path, found, settings)


@contextmanager
def opened(root: Path, name: str | None) -> "Iterator[tuple[Repo, str, Mapping[str, Any]]]":
    """Yield DVC's repository at `root`, and a remote's name and settings; None: the default one. Raises InputError."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            found = _named(repo.config, name)
            yield repo, found, repo.config["remote"][found]
    except DvcException as error:  # the configuration, in DVC's words
        raise InputError(" ".join(str(error).split())) from None


def _named(config: Mapping[str, Any], name: str | None) -> str:
    from lathe.common.text import did_you_mean

    known = list(config["remote"])
    if name is None:
        name = config["core"].get("remote")
        if name is None:
            raise InputError("no remote is the default; give --remote NAME, or set one with `dvc remote default NAME`")
    if name.lower() not in known:  # DVC keeps their names in lower case
        raise InputError(f"--remote {name}: no such remote in .dvc/config; {did_you_mean(name, known)}")
    return name.lower()


def _tried(fs: Any, path: str, name: str, settings: Mapping[str, Any]) -> str:
    folder = fs.join(path, f".lathe-remote-check-{os.urandom(8).hex()}")
    target = fs.join(folder, "object")
    content = os.urandom(OBJECT_BYTES)
    started = time.perf_counter()
    done: list[str] = []

    def step(action: str, run: Callable[[], object]) -> object:
        try:
            result = _in_time(run)
        except Exception as error:
            raise refusal(error, action, name, settings, left=f"; {target} is left there" if done else "") from error
        done.append(action)
        return result

    def write() -> None:
        if fs.protocol == "s3":
            _ask_once(fs)
        fs.makedirs(folder, exist_ok=True)
        fs.pipe_file(target, content)

    step("write", write)
    found = step("list", lambda: list(fs.find(folder)))
    read = step("read", lambda: fs.cat_file(target))
    step("delete", lambda: fs.rm([target]))
    if fs.exists(folder):  # a folder is a thing of its own on a disk, and nothing in S3
        step("delete", lambda: fs.rmdir(folder))
    where = _addressed(name, settings)
    if [fs.name(str(entry)) for entry in found] != [fs.name(target)] or read != content:  # type: ignore[attr-defined]
        raise InputError(f"{where}: what was written is not what was listed and read back; do not keep data there")
    seconds = time.perf_counter() - started
    return f"{where}: {OBJECT_BYTES:,} bytes written, listed, read back the same and deleted in {seconds:.1f} s"


def refusal(error: Exception, step: str, name: str, settings: Mapping[str, Any], left: str = "") -> InputError:
    """Return in one line, without a secret, what an error of DVC's file system stands for, and the remedy.

    `step` is what was tried ("write", "read", …), `left` what else is to be said; `settings` are the remote's.
    """
    rule, remedy = _explained(error, step, name, settings)
    return InputError(_without_secrets(f"{_addressed(name, settings)}: {rule}{left}; {remedy}", settings))


def _addressed(name: str, settings: Mapping[str, Any]) -> str:
    where = shown(name, settings)
    return f"{where} at {endpoint(settings)}" if str(settings["url"]).startswith("s3://") else where


def _in_time(run: Callable[[], object]) -> object:
    """Return what `run` returns, or raise what it raises; TimeoutError when it takes too long, and leave it alone."""
    outcome: Future[object] = Future()

    def work() -> None:
        try:
            outcome.set_result(run())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon: the process need not wait for it at its end
    return outcome.result(timeout=SECONDS_FOR_A_STEP)


def _ask_once(fs: Any) -> None:
    # A check is to say what is wrong, and soon: a push is right to try again.
    fs.fs_args.setdefault("config_kwargs", {})["retries"] = {"total_max_attempts": 1}
    fs.fs.retries = 1


def _explained(error: Exception, step: str, name: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    configured = any(key in settings for key in ("access_key_id", "secret_access_key"))
    words = {
        "step": step,
        "name": name,
        "bucket": urllib.parse.urlsplit(str(settings["url"])).hostname or "",
        "keys": (
            "access_key_id and secret_access_key in .dvc/config.local"
            if configured
            else "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ),
    }
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        code = str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""
        known = ANSWERS.get(code) or SILENCES.get(type(cause).__name__) or (NO_S3 if code.isdigit() else None)
        if known:
            rule, remedy = (text.format(**words) for text in known)
            return rule, remedy
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return f"may not {step} there ({error.strerror or error})", "make it a folder that this user can write to"
    text = " ".join(str(error).split()) or "no more is said"
    return (
        f"could not {step} there: {type(error).__name__}: {text}",
        f"see `dvc remote modify --help` and {name} in .dvc/config",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _without_secrets(text: str, settings: Mapping[str, Any]) -> str:
    from lathe.common.redaction import hide

    values = [os.environ.get(variable, "") for variable in SECRET_VARIABLES]
    values += [str(settings.get(key) or "") for key in SECRET_SETTINGS]
    return hide(text, values)
