"""Signed statement: which files, by their SHA-256, were made from what, signed with a key of one's own.

The statement is in-toto's (https://in-toto.io/Statement/v1) with SLSA's predicate of provenance, the envelope around it
DSSE, the signature Ed25519 by securesystemslib: other tools read all three. It holds no date, so that equal files give
equal bytes.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import find_head, try_git
from lathe.provenance.lineage import list_files

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope

STATEMENT_FILE = "provenance.intoto.jsonl"
STATEMENT_TYPE, PREDICATE_TYPE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUILD_TYPE = "urn:lathe:pipeline:v1"
PASSWORD_VARIABLE = "LATHE_SIGNING_PASSWORD"

# What a hub or its client adds to a repository, and what cannot sign itself.
NOT_SIGNED = (".gitattributes", ".cache/", ".git/", STATEMENT_FILE)


@dataclass(frozen=True)
class Checked:
    """What was verified: the id of the key, the signed facts of the files' origin, and a line for each problem."""

    key: str
    files: int
    origin: Mapping[str, Any]
    problems: list[str]


def make_key(file: Path) -> Path:
    """Write a new private key to `file`, which its owner alone may read, and the public one to `file`.pub.

    It is encrypted if LATHE_SIGNING_PASSWORD is set. Raises InputError if one of the files exists.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    public = file.with_name(f"{file.name}.pub")
    if taken := next((path for path in (file, public) if path.exists()), None):
        raise InputError(f"{taken}: exists; a key is not written over, name another file", code="file-exists")
    password = os.environ.get(PASSWORD_VARIABLE, "").encode()
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password) if password else NoEncryption()
    )
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be written ({error.strerror}); name another file", code="unwritable"
        ) from None
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return public


def make_statement(folder: Path, lineage: Mapping[str, str]) -> dict[str, Any]:
    """Return the statement on every file of a folder; `lineage` are the `lathe.*` keys of a GGUF in it."""
    subjects = [
        {"name": name, "digest": {"sha256": hash_file(file)}}
        for name, file in list_files(folder)
        if not name.startswith(NOT_SIGNED)
    ]
    changes = try_git("status", "--porcelain", "--untracked-files=no", root=paths.ROOT)
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "parameters_sha256": lineage.get("parameters.digest"),
                    "commit": find_head(paths.ROOT),
                    "uncommitted_changes": bool(changes),
                },
                "resolvedDependencies": list(_list_dependencies(lineage)),
            },
            "runDetails": {"builder": {"id": f"urn:lathe:{lineage.get('version', 'unknown')}"}},
        },
    }


def sign_statement(statement: Mapping[str, Any], key: Path) -> str:
    """Return the signed statement as a line of JSON. Raises InputError if the private key cannot be read."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    payload = json.dumps(statement, sort_keys=True, ensure_ascii=False).encode()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(_read_private_key(key)))
    return json.dumps(envelope.to_dict(), sort_keys=True) + "\n"


def verify_statement(path: Path, key: Path) -> Checked:
    """Verify a folder against the signed statement in it, or one file against that beside it, with a public key.

    Raises InputError if there is no statement, or if the key has not signed it as it is.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / STATEMENT_FILE
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; name what was downloaded", code="no-such-file")
    envelope = _read_envelope(file)
    statement, signer = _open_envelope(envelope, file, key)
    signed = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    found = {name: each for name, each in list_files(folder) if not name.startswith(NOT_SIGNED)}
    if path.is_file():
        found = {path.name: path}
        signed = {name: digest for name, digest in signed.items() if name == path.name}
    build = statement["predicate"]["buildDefinition"]
    return Checked(signer, len(signed), build, list(_compare(found, signed)))


def _compare(found: Mapping[str, Path], signed: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*found, *signed}):
        if name not in found:
            yield f"{name}: missing; download it again"
        elif name not in signed:
            yield f"{name}: the statement does not name it; it was added later, remove it"
        elif (digest := hash_file(found[name])) != signed[name]:
            yield f"{name}: changed (SHA-256 {digest}, signed {signed[name]}); download it again"


def _list_dependencies(lineage: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield base, data and adapter with DVC's digest of each, as `dvc.lock` and the GGUF have it."""
    for name in ("base", "dataset", "adapter"):
        if digest := lineage.get(f"{name}.digest"):
            origin = {"name": name, "digest": {"dvc_md5": digest}}
            if repository := lineage.get(f"{name}.id"):
                kind = "datasets/" if name == "dataset" else ""
                origin["uri"] = f"hf://{kind}{repository}@{lineage.get(f'{name}.commit', 'main')}"
            yield origin


def _read_private_key(file: Path) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        return load_pem_private_key(file.read_bytes(), password.encode() if password else None)
    except OSError:
        raise InputError(
            f"{file}: cannot be read; `lathe sign-key {shlex.quote(str(file))}` makes a key", code="no-such-key"
        ) from None
    except TypeError:
        what = f"is not encrypted; unset {PASSWORD_VARIABLE}" if password else f"is encrypted; set {PASSWORD_VARIABLE}"
        raise InputError(f"{file}: the key {what}", code="key-password") from None
    except ValueError:
        raise InputError(
            f"{file}: is no private key in PEM, or {PASSWORD_VARIABLE} is not its password; name the key of "
            "`lathe sign-key`",
            code="invalid-key-file",
        ) from None


def _read_envelope(file: Path) -> "Envelope":
    from securesystemslib.dsse import Envelope

    try:
        return Envelope.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{file}: no such file: nothing is signed here; download {STATEMENT_FILE} of the same repository",
            code="not-signed",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise InputError(f"{file}: is no signed statement; download it again", code="invalid-statement") from None


def _open_envelope(envelope: "Envelope", file: Path, key: Path) -> tuple[dict[str, Any], str]:
    """Return the statement and the id of the key that signed it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    try:
        public = SSlibKey.from_crypto(load_pem_public_key(key.read_bytes()))
    except (OSError, ValueError):
        raise InputError(
            f"{key}: is no public key in PEM; name the file that ends in .pub, from whom you trust",
            code="invalid-key-file",
        ) from None
    try:
        envelope.verify([public], 1)
    except VerificationError:
        raise InputError(
            f"{file}: {key} has not signed this statement, or it was changed; ask its publisher for the key and the "
            "file, and trust nothing here until then",
            code="wrong-signature",
        ) from None
    statement = json.loads(envelope.payload)
    kind = (envelope.payload_type, statement.get("_type"), statement.get("predicateType"))
    if kind != (PAYLOAD_TYPE, STATEMENT_TYPE, PREDICATE_TYPE):
        raise InputError(
            f"{file}: signs something else ({kind[2]}); name the statement of a release", code="other-statement"
        )
    return statement, public.keyid


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
