"""Hugging Face Hub: revisions resolved to commits, files downloaded, resumed and verified.

Files are in the user's own Hub cache (`HF_HOME`, `HF_HUB_CACHE`), in its own layout: files that another tool downloaded
are used, and other tools can use those that are downloaded here.
"""

import functools
import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_token,
    hf_hub_url,
)
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars
from huggingface_hub.utils.logging import disable_propagation
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.common.text import readable_bytes, summarize_error
from lathe.sources.hub_answers import UNREADABLE, bound_answers
from lathe.sources.hub_download import BoundedFile, FileBar, TooLongError

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
Response = TypeVar("Response")

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

WAITS_SECONDS = (1.0, 2.0, 4.0)  # between attempts that the library does not make itself
LONGEST_WAIT_SECONDS = 60.0  # a hub that asks for a longer wait is not waited for
SERVER_FAILURES = frozenset({500, 502, 503, 504})
RETRIED_STATUSES = frozenset({408, 429}) | SERVER_FAILURES
TIMEOUT_SECONDS = 30.0
MOST_FILES = 250_000  # of a repository

# A connection that broke after it was made; if none can be made the cache is used instead of another attempt.
CONNECTION_ERRORS = (httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError)


class HubUnreachableError(InputError):
    """The Hub cannot be reached."""


class Repository:
    """A model or dataset repository at one commit.

    The token is `HF_TOKEN`, or that of `hf auth login`; it is sent to the Hub alone, not to the hosts that it redirects
    downloads to.
    """

    def __init__(self, kind: Kind, name: str, revision: str | None) -> None:
        """Resolve `revision` (commit, branch, tag; None: the main branch) to a commit; warn unless it is one.

        A commit whose files are in the cache needs no Hub. Raises InputError, one line with the remedy, if the Hub
        refuses or cannot be reached.
        """
        disable_progress_bars()  # one bar for all files instead of one per file
        disable_propagation()  # or messages of the library appear twice
        self.kind, self.name, self.revision = kind, name, revision
        self.folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
        self._verified: set[str] = set()
        self.commit = revision if revision and COMMIT.fullmatch(revision) else None
        if self.commit is None:
            self.commit = self._resolve_revision()
            logger.warning(
                "%s is not pinned: %r may mean other files tomorrow; to keep these, put into its entry in "
                "presets.yaml\n    revision: %s",
                name,
                revision or "main",
                self.commit,
            )

    @cached_property
    def paths(self) -> list[str]:
        """The paths of all files of the commit."""
        assert self.commit
        try:
            listed = get_cached_repo_tree(self.name, repo_type=self.kind, revision=self.commit)
            return sorted(self._check_path(file.path) for file in listed)
        except CachedRepoTreeNotFoundError:
            pass
        try:
            return sorted(self._listing)
        except HubUnreachableError:
            # Without the Hub a dataset in the cache may be incomplete; of a model the index tells.
            if self.kind == "dataset" or not any(self._snapshot.glob("*.safetensors")):
                raise
            logger.info("%s: the hub cannot be asked for the list of its files; taking those in the cache", self.name)
            return sorted(file.name for file in self._snapshot.iterdir())

    def files(self, wanted: Iterable[str]) -> dict[str, Path]:
        """Return the paths of files in the cache, each verified by its hash; download those that it lacks.

        Raises InputError if the Hub refuses, if the disk is too small, and if a file is not what the Hub announced;
        such a file is removed, and the next run downloads it again.
        """
        chosen = list(wanted)
        missing = [path for path in chosen if path not in self._verified and not self._is_cached(path)]
        if missing:
            self._download([self._listing[path] for path in missing])
        self._verified.update(chosen)
        return {path: self._snapshot / path for path in chosen}

    @property
    def _snapshot(self) -> Path:
        assert self.commit
        return self.folder / "snapshots" / self.commit

    @cached_property
    def _listing(self) -> dict[str, RepoFile]:
        # First, because it reports a wrong name or commit, or an unreachable Hub, at once.
        self._request_info(self.commit)
        entries = self._request(self._list_tree)
        if len(entries) > MOST_FILES:
            raise InputError(
                f"{self.name}: the hub lists more than {MOST_FILES:,} files; use another repository",
                code="too-many-files",
            )
        files = {self._check_path(entry.path): entry for entry in entries if isinstance(entry, RepoFile)}
        for file in files.values():
            self._check_hash(file.lfs.sha256 if file.lfs else file.blob_id, SHA256 if file.lfs else COMMIT)
            if not isinstance(file.size, int) or file.size < 0:
                raise InputError(
                    f"{self.name}: the hub says that {file.path!r} has {file.size!r} bytes; use another repository",
                    code="unsafe-size",
                )
        return files

    def _list_tree(self) -> list[Any]:
        listed = HfApi().list_repo_tree(self.name, repo_type=self.kind, revision=self.commit, recursive=True)
        return list(itertools.islice(listed, MOST_FILES + 1))

    def _check_path(self, path: object) -> str:
        """Return the path of a file that the hub names; it becomes one below the folder of the repository."""
        if not isinstance(path, str) or "\0" in path or {"", ".", ".."} & set(path.split("/")):
            raise InputError(
                f"{self.name}: {path!r} would lie outside of its folder; use another repository", code="unsafe-path"
            )
        return path

    def _check_hash(self, name: object, form: re.Pattern[str]) -> str:
        """Return a hash that the hub names; it becomes the name of a file or folder, and so must be nothing else."""
        if not isinstance(name, str) or not form.fullmatch(name):
            raise InputError(
                f"{self.name}: the hub names {name!r} where a hash belongs; use another hub or repository",
                code="unsafe-hash",
            )
        return name

    def _resolve_revision(self) -> str:
        ref = self.folder / "refs" / (self.revision or constants.DEFAULT_REVISION)
        known = ref.read_text().strip() if ref.is_file() else None
        try:
            commit = self._check_hash(self._request_info(self.revision).sha, COMMIT)
        except HubUnreachableError as unreachable:
            if not known:
                raise
            raise HubUnreachableError(
                f"{unreachable}; to use what the cache has of it, pin its entry in presets.yaml: `revision: {known}`",
                code="hub-unreachable",
            ) from None
        if commit != known:  # for other tools that use this cache
            with paths.replace_file(ref) as partial:
                partial.write_text(commit)
        return commit

    def _request_info(self, revision: str | None) -> Any:
        return self._request(
            lambda: HfApi().repo_info(self.name, repo_type=self.kind, revision=revision, timeout=TIMEOUT_SECONDS),
            retried=RETRIED_STATUSES,
        )

    def _is_cached(self, path: str) -> bool:
        pointer = self._snapshot / path
        if not pointer.exists():
            return False
        # In the cache a file is a link to a blob named by its hash; without links the hash is unknown.
        etag = pointer.readlink().name if pointer.is_symlink() else ""
        if (not COMMIT.fullmatch(etag) and not SHA256.fullmatch(etag)) or _hash_file(pointer, etag) == etag:
            return True
        logger.warning("%s: %s in the cache is damaged; it is removed", self.name, path)
        pointer.resolve().unlink()
        pointer.unlink()
        return False

    def _download(self, files: list[RepoFile]) -> None:
        self._require_space(
            sum(
                file.size - _get_size(self._partial_path(file))
                for file in files
                if not _get_size(self._blob_path(file))
            )
        )
        for file in files:
            if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
                raise InputError(
                    f"{self.name}: {file.path} has {readable_bytes(file.size)}, more than the hub gives in one piece; "
                    f"run `hf download {self.name} --repo-type {self.kind} --revision {self.commit}` first",
                    code="file-too-large",
                )
        with Progress(self.name, sum(file.size for file in files), unit="B", log_ends=True) as progress:
            for file in files:
                self._download_file(file, progress)
        # Not by snapshot_download: it asks the hub for the listing again, and takes the names of that unchecked.
        for file in files:
            self._link(file)
        self._keep_listing()

    def _link(self, file: RepoFile) -> None:
        """Put a downloaded file under its name into the cache's folder of the commit."""
        pointer, blob = self._snapshot / file.path, self._blob_path(file)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with paths.replace_file(pointer) as partial:
            try:
                partial.symlink_to(os.path.relpath(blob, pointer.parent))
            except OSError:  # a file system without links
                paths.link(blob, partial)

    def _keep_listing(self) -> None:
        """Keep the listing in the cache, in its own form, for runs without a network."""
        assert self.commit
        entries = {
            path: TreeCacheEntry(
                size=file.size,
                blob_id=file.blob_id,
                lfs_sha256=file.lfs.sha256 if file.lfs else None,
                lfs_size=file.lfs.size if file.lfs else None,
            )
            for path, file in self._listing.items()
        }
        write_tree_cache(str(self.folder), self.commit, entries)

    def _download_file(self, file: RepoFile, progress: Progress) -> None:
        # The library's own download starts a file again after its process was killed; hours may be lost.
        blob, partial = self._blob_path(file), self._partial_path(file)
        lock = Path(constants.HF_HUB_CACHE) / ".locks" / self.folder.name / f"{blob.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists() and _hash_file(blob, blob.name) == blob.name:  # of another commit
                progress.add(file.size)
                return
            if _get_size(partial) > file.size:
                partial.unlink()
            file_progress = FileBar(progress)
            download = functools.partial(self._download_bytes, file, partial, file_progress)
            self._request(download, retried=SERVER_FAILURES, of_file=True)
            if _hash_file(partial, blob.name) != blob.name:
                partial.unlink()
                raise InputError(
                    f"{self.name}: {file.path} came with another hash than the hub announced ({blob.name[:12]}…); it "
                    "is removed, run again to download it",
                    code="wrong-hash",
                )
            partial.replace(blob)

    def _download_bytes(self, file: RepoFile, partial: Path, progress: FileBar) -> None:
        url = hf_hub_url(self.name, file.path, repo_type=self.kind, revision=self.commit)
        headers = {**build_hf_headers(library_name="lathe"), "Accept-Encoding": "identity"}
        with partial.open("ab") as target:
            try:
                # A redirect to another host is followed without the Authorization header.
                http_get(
                    url,
                    cast(BinaryIO, BoundedFile(target, file.size)),
                    resume_size=target.tell(),
                    headers=headers,
                    expected_size=file.size,
                    tqdm_class=progress,  # type: ignore[arg-type]
                )
            except OSError as error:
                # The library's error for another size than the announced one, and that of what is longer.
                if "Consistency check failed" not in str(error) and not isinstance(error, TooLongError):
                    raise
                partial.unlink()
                raise InputError(
                    f"{self.name}: {file.path} came in another size than the hub announced ({file.size} bytes); it is "
                    "removed, run again to download it",
                    code="wrong-size",
                ) from None

    def _blob_path(self, file: RepoFile) -> Path:
        return self.folder / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id)

    def _partial_path(self, file: RepoFile) -> Path:
        return self._blob_path(file).with_suffix(".incomplete")

    def _require_space(self, needed: int) -> None:
        folder = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{self.name} takes {readable_bytes(needed)} in {constants.HF_HUB_CACHE}, where {readable_bytes(free)} "
                "are free; free some, or set HF_HOME to a folder on a larger disk",
                code="disk-too-small",
            )

    def _request(
        self, action: Callable[[], Response], retried: frozenset[int] = frozenset(), *, of_file: bool = False
    ) -> Response:
        """Ask the hub; the answer is bounded, except for the bytes of a file, whose size is known."""
        waits = list(WAITS_SECONDS if retried else ())
        while True:
            try:
                with nullcontext() if of_file else bound_answers():
                    return action()
            except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError) as error:
                problem: BaseException = error
                if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
                    problem = error.__cause__
                seconds = _choose_delay(problem, retried, waits[0]) if waits else None
                if seconds is None:
                    raise self._explain_error(problem) from None
                del waits[0]
                logger.warning("%s: %s; asking again in %.0f s", self.name, summarize_error(problem), seconds)
                time.sleep(seconds)
            except UNREADABLE as error:
                raise InputError(
                    f"{self.name}: the hub's answer cannot be read ({summarize_error(error)}); check HF_ENDPOINT where "
                    "it is set, or use another hub",
                    code="unreadable-answer",
                ) from None

    def _explain_error(self, error: BaseException) -> InputError:
        page = f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        if isinstance(error, OfflineModeIsEnabled):
            return HubUnreachableError(
                f"{self.name}: the hub has to be asked, but HF_HUB_OFFLINE is set; unset it and run again",
                code="hub-offline",
            )
        if not isinstance(error, HfHubHTTPError):
            return HubUnreachableError(
                f"{self.name}: no answer from {constants.ENDPOINT} ({summarize_error(error)}); check the network, and "
                "HTTPS_PROXY and HF_ENDPOINT where they are set",
                code="hub-unreachable",
            )
        status, with_token = error.response.status_code, get_token() is not None
        if isinstance(error, GatedRepoError):
            how = "with the account of your token" if with_token else "and set HF_TOKEN to a token of that account"
            return InputError(f"{self.name} is gated; accept its terms at {page} {how}", code="gated-repository")
        if isinstance(error, RevisionNotFoundError):
            return InputError(
                f"{self.name} has no revision {self.revision!r}; give a commit, tag or branch from {page}/commits/main",
                code="no-such-revision",
            )
        if status in {401, 404} and not with_token:
            return InputError(
                f"{self.name}: no such {self.kind} on {constants.ENDPOINT}, or not a public one; check `id` in "
                f"presets.yaml, or set HF_TOKEN to a token that may read it ({constants.ENDPOINT}/settings/tokens)",
                code="no-such-repository",
            )
        if status == 401:
            return InputError(
                f"{self.name}: the hub does not accept the token of HF_TOKEN; make a new one at "
                f"{constants.ENDPOINT}/settings/tokens, or unset it for a public repository",
                code="token-refused",
            )
        if status == 403:
            return InputError(
                f"{self.name}: the token of HF_TOKEN may not read it (403); give it read access at "
                f"{constants.ENDPOINT}/settings/tokens",
                code="token-not-allowed",
            )
        if status == 404:
            return InputError(
                f"{self.name}: no such {self.kind} on {constants.ENDPOINT}, or the account of HF_TOKEN may not see it; "
                f"check `id` in presets.yaml",
                code="no-such-repository",
            )
        if status == 429:
            seconds = error.response.headers.get("Retry-After")
            when = f"in {seconds} s" if seconds else "later"
            remedy = "" if with_token else "; with HF_TOKEN set the hub allows more"
            return InputError(
                f"{self.name}: the hub takes no more requests for now (429); run again {when}{remedy}",
                code="too-many-requests",
            )
        return InputError(
            f"{self.name}: the hub answers {status} ({error.response.reason_phrase}); run again later, what is "
            "downloaded is kept",
            code="hub-failed",
        )


def _choose_delay(error: BaseException, retried: frozenset[int], default: float) -> float | None:
    """Return the seconds before the next attempt; None if none is made."""
    if isinstance(error, CONNECTION_ERRORS):
        return default
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in retried:
        return None
    asked = error.response.headers.get("Retry-After", "")
    seconds = float(asked) if asked.isdigit() else default
    return seconds if seconds <= LONGEST_WAIT_SECONDS else None


def _hash_file(file: Path, like: str) -> str:
    """Return the SHA-256 of a file if `like` is one, as of large files; else Git's blob hash."""
    if SHA256.fullmatch(like):
        with file.open("rb") as stream:
            return sha_fileobj(stream).hex()
    return git_hash(file.read_bytes())


def _get_size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
