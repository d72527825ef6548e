"""Upload of a release to the Hub, in one commit, and the check that what lies there is what was sent."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.redaction import hide_secrets
from lathe.common.text import summarize_error
from lathe.provenance.signed_statement import hash_file
from lathe.publishing.release import Release

TOKEN_VARIABLE = "HF_TOKEN"


def upload(release: Release, *, public: bool, environment: Mapping[str, str] = os.environ) -> str:
    """Create the repository, private unless `public`, upload all files, compare their hashes; return the address.

    Raises InputError without HF_TOKEN, for a repository that is public although `public` is not given, and for whatever
    the Hub refuses; the token is in no message.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from lathe.sources.hub_answers import UNREADABLE, bound_answers

    token = require_token(release.repository, environment)
    api = HfApi(token=token)
    try:
        with bound_answers():
            return _upload(api, release, public=public)
    except InputError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: f"{TOKEN_VARIABLE} is not valid; make a new token",
            403: f"the token may not write there; give it write access to {release.repository}",
        }.get(status, "run it again: files that have arrived are not sent twice")
        problem = hide_secrets(summarize_error(error), [token])
        raise InputError(
            f"{release.repository}: the hub answers {status} ({problem}); {remedy}", code="hub-refuses"
        ) from None
    except (httpx2.HTTPError, OSError, RuntimeError, *UNREADABLE) as error:
        problem = hide_secrets(summarize_error(error), [token])
        raise InputError(
            f"{release.repository}: the upload failed ({problem}); run it again: files that have arrived are not sent "
            "twice",
            code="upload-failed",
        ) from None


def require_token(repository: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return HF_TOKEN; raises InputError if it is not set. That of `hf auth login` is not taken."""
    token = environment.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise InputError(
            f"{TOKEN_VARIABLE}: is not set; set it to a token that may write to {repository}", code="missing-token"
        )
    return token


def _upload(api: Any, release: Release, *, public: bool) -> str:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api.create_repo(release.repository, repo_type="model", private=not public, exist_ok=True)
    info = api.model_info(release.repository)
    if not info.private and not public:
        raise InputError(
            f"{release.repository}: exists and is public; give --public, or another name", code="public-repository"
        )
    commit = api.upload_folder(
        repo_id=release.repository,
        folder_path=release.folder,
        commit_message=f"Lathe: {len(release.files)} files",
        revision="main",
    )
    _compare(api, release, commit.oid)
    return f"{api.endpoint}/{release.repository}/tree/{commit.oid}{'' if public or not info.private else ' (private)'}"


def _compare(api: Any, release: Release, commit: str) -> None:
    """Raise InputError if the Hub has other hashes of the files than they have here."""
    listed = {
        entry.path: entry for entry in api.get_paths_info(release.repository, list(release.files), revision=commit)
    }
    for name in release.files:
        entry, file = listed.get(name), release.folder / name
        there = None if entry is None else entry.lfs.sha256 if entry.lfs else entry.blob_id
        if there != (hash_file(file) if entry is not None and entry.lfs else _hash_blob(file)):
            raise InputError(
                f"{release.repository}: {name} has another hash there ({there}) than here; upload it again",
                code="wrong-hash",
            )


def _hash_blob(file: Path) -> str:
    """Return the hash by which Git knows a file."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
