"""Remotes of DVC: name, address, credentials, and the check `python -m lathe remote-check`.

The check uses what `dvc push` uses: DVC's own file system of the remote, with DVC's configuration and credentials. The
errors of S3 and of its client are a screen of text that may contain the request; here each becomes one line without a
secret.

Only the standard library is imported at the top, because `python -m lathe doctor` must start in a broken environment.
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
from typing import Any

from lathe.common.dvc_api import DvcRepository, RemoteStorage, open_repository
from lathe.common.errors import InputError

SECONDS_FOR_A_CONNECTION = 2.0

# Timeout of each step of a check. The client's own timeouts do not cover every wait: that for `100 Continue` has none.
SECONDS_FOR_A_STEP = 30.0

OBJECT_BYTES = 1024

# Packages whose exceptions are those of a remote.
CLIENTS = ("aiobotocore", "aiohttp", "asyncssh", "botocore", "dvc", "dvc_data", "dvc_objects", "fsspec", "s3fs")

SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SECRET_SETTINGS = ("access_key_id", "secret_access_key", "session_token", "password", "passphrase", "client_secret")

# Error codes of S3, as (problem, remedy); {step} is what was tried, {name} the remote, {bucket} its bucket.
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
SERVER_ERRORS = {
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

# Errors of the client without a response of the server, by the names of botocore's exceptions.
CLIENT_ERRORS = {
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


def describe_remote(name: str, remote: Mapping[str, Any]) -> str:
    """Return name and address of a remote, without the user and password that the address may contain."""
    url = urllib.parse.urlsplit(str(remote["url"]))
    return f"{name} ({url.scheme}://{url.hostname or ''}{url.path})" if url.scheme else f"{name} ({url.path})"


def get_endpoint(remote: Mapping[str, Any]) -> str:
    """Return the address that an S3 remote's requests go to."""
    return str(remote.get("endpointurl") or "https://s3.amazonaws.com")


def has_credentials(remote: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Tell whether an S3 client would find a key: in the environment, the remote's settings, or AWS's files."""
    return bool(
        {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {key for key, value in environment.items() if value}
        or environment.get("AWS_PROFILE")
        or {"access_key_id", "profile", "credentialpath"} & set(remote)
        or Path("~/.aws/credentials").expanduser().exists()
    )


def connect(url: str) -> None:
    """Open a connection and close it; raise OSError if it is not accepted soon. With a proxy nothing is tried."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return
    address = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection(address, timeout=SECONDS_FOR_A_CONNECTION).close()
    except OSError as error:
        raise OSError(f"{address[0]}:{address[1]} does not answer ({error.strerror or error})") from None


def check_remote(root: Path, name: str | None) -> str:
    """Write an object to the remote, find it, read it back, compare and delete it; return what was done, in a line.

    `name` is one of the remotes of the checkout at `root`; None: the default one. Raises InputError with one line.
    """
    with open_remote(root, name) as (repo, remote, settings):
        return _try_operations(repo.remote(remote), remote, settings)


@contextmanager
def open_remote(root: Path, name: str | None) -> Iterator[tuple[DvcRepository, str, Mapping[str, Any]]]:
    """Yield DVC's repository at `root`, and a remote's name and settings; None: the default one.

    Raises InputError, also for what DVC or the remote's client raises in the block, such as without a network.
    """
    with open_repository(root) as repo:
        remote = _resolve_name(repo.config, name)
        settings = repo.config["remote"][remote]
        try:
            yield repo, remote, settings
        except Exception as error:
            if isinstance(error, InputError) or not _is_of_client(error):
                raise
            raise explain_error(error, "read or write", remote, settings) from None


def _is_of_client(error: Exception) -> bool:
    return any(
        isinstance(cause, OSError) or type(cause).__module__.partition(".")[0] in CLIENTS
        for cause in _walk_causes(error)
    )


def _resolve_name(config: Mapping[str, Any], name: str | None) -> str:
    from lathe.common.text import did_you_mean

    known = list(config["remote"])
    if name is None:
        name = config["core"].get("remote")
        if name is None:
            raise InputError(
                "no remote is the default; give --remote NAME, or set one with `dvc remote default NAME`",
                code="no-default-remote",
            )
    if name.lower() not in known:  # DVC stores names in lower case
        raise InputError(
            f"--remote {name}: no such remote in .dvc/config; {did_you_mean(name, known)}", code="no-such-remote"
        )
    return name.lower()


def _try_operations(storage: RemoteStorage, name: str, settings: Mapping[str, Any]) -> str:
    folder = storage.join(f".lathe-remote-check-{os.urandom(8).hex()}")
    target = f"{folder}/object"
    content = os.urandom(OBJECT_BYTES)
    started = time.perf_counter()
    done: list[str] = []

    def run_step(action: str, run: Callable[[], object]) -> object:
        try:
            result = _run_with_timeout(run)
        except Exception as error:
            note = f"; {target} is left there" if done else ""
            raise explain_error(error, action, name, settings, note=note) from error
        done.append(action)
        return result

    def write() -> None:
        # A check must report an error soon; a push does well to retry.
        storage.disable_retries()
        storage.write(target, content)

    run_step("write", write)
    listed = run_step("list", lambda: storage.list_files(folder))
    read = run_step("read", lambda: storage.read(target, OBJECT_BYTES + 1))
    run_step("delete", lambda: storage.delete_file(target))
    run_step("delete", lambda: storage.delete_folder(folder))
    where = _describe_with_endpoint(name, settings)
    if listed != ["object"] or read != content:
        raise InputError(
            f"{where}: what was written is not what was listed and read back; do not keep data there",
            code="unreliable-remote",
        )
    seconds = time.perf_counter() - started
    return f"{where}: {OBJECT_BYTES:,} bytes written, listed, read back the same and deleted in {seconds:.1f} s"


def explain_error(error: Exception, step: str, name: str, settings: Mapping[str, Any], note: str = "") -> InputError:
    """Return an error of DVC's file system as an InputError of one line, without a secret, with its remedy.

    `step` is what was tried ("write", "read", …), `note` is added to the problem; `settings` are the remote's.
    """
    problem, remedy = _find_cause(error, step, name, settings)
    text = f"{_describe_with_endpoint(name, settings)}: {problem}{note}; {remedy}"
    return InputError(_hide_secrets(text, settings), code="remote-failed")


def _describe_with_endpoint(name: str, settings: Mapping[str, Any]) -> str:
    where = describe_remote(name, settings)
    return f"{where} at {get_endpoint(settings)}" if str(settings["url"]).startswith("s3://") else where


def _run_with_timeout(run: Callable[[], object]) -> object:
    """Return what `run` returns, or raise what it raises; raise TimeoutError if it takes too long, and abandon it."""
    outcome: Future[object] = Future()

    def work() -> None:
        try:
            outcome.set_result(run())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon: the process does not wait for it at its end
    return outcome.result(timeout=SECONDS_FOR_A_STEP)


def _find_cause(error: Exception, step: str, name: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return problem and remedy of an error."""
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
    for cause in _walk_causes(error):
        response = getattr(cause, "response", None)
        code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
        known = (
            SERVER_ERRORS.get(code) or CLIENT_ERRORS.get(type(cause).__name__) or (NO_S3 if code.isdigit() else None)
        )
        if known:
            problem, remedy = (text.format(**words) for text in known)
            return problem, remedy
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return f"may not {step} there ({error.strerror or error})", "make it a folder that this user can write to"
    text = " ".join(str(error).split()) or "no reason given"
    return (
        f"could not {step} there: {type(error).__name__}: {text}",
        f"see `dvc remote modify --help` and {name} in .dvc/config",
    )


def _walk_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _hide_secrets(text: str, settings: Mapping[str, Any]) -> str:
    from lathe.common.redaction import hide_secrets

    values = [os.environ.get(variable, "") for variable in SECRET_VARIABLES]
    values += [str(settings.get(key) or "") for key in SECRET_SETTINGS]
    return hide_secrets(text, values)
