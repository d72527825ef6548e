"""Files of the Hugging Face Hub: a revision made a commit, what is missing downloaded, all of it verified.

Files lie in the user's own hub cache (`HF_HOME`, `HF_HUB_CACHE`), in its own layout: what another tool downloaded is
used, and what is downloaded here is there for other tools.
"""

import glob
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_token,
    hf_hub_url,
    snapshot_download,
)
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
from lathe.common.text import readable_bytes

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
Answer = TypeVar("Answer")

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

WAITS_SECONDS = (1.0, 2.0, 4.0)  # before asking again where the library does not do so itself
LONGEST_WAIT_SECONDS = 60.0  # a hub that asks for more is not waited for
BROKEN_DOWN = frozenset({500, 502, 503, 504})
BUSY = frozenset({408, 429}) | BROKEN_DOWN
TIMEOUT_SECONDS = 30.0

# The connection broke after it had been made; one that was never made is not asked for again, but the cache is.
BROKEN = (httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError)


class UnreachableError(InputError):
    """The hub gives no answer at all."""


class Repository:
    """A model or dataset repository at one commit.

    The token is the one of `HF_TOKEN`, or that of `hf auth login`; it is sent to the hub alone, not to the hosts that
    the hub redirects downloads to.
    """

    def __init__(
        self,
        kind: Kind,
        name: str,
        revision: str | None,
        *,
        id_key: str = "`id` in presets.yaml",
        section: str = "its entry in presets.yaml",
    ) -> None:
        """Resolve `revision` (commit, branch, tag; None: the main branch) to a commit; warn unless it is one.

        `id_key` is where the user named the repository, `section` where the key `revision` stands: for what is said.
        A commit whose files are in the cache needs no hub. Raises InputError, one line with the remedy, where the hub
        refuses or cannot be reached.
        """
        disable_progress_bars()  # one bar of ours instead of one per file
        disable_propagation()  # or what the library says appears twice
        self.kind, self.name, self.revision = kind, name, revision
        self.id_key, self.section = id_key, section
        self.folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
        self._verified: set[str] = set()
        self.commit = revision if revision and COMMIT.fullmatch(revision) else None
        if self.commit is None:
            self.commit = self._resolved()
            logger.warning(
                "%s is not pinned: %r may mean other files tomorrow; to keep these, put into %s\n    revision: %s",
                name,
                revision or "main",
                section,
                self.commit,
            )

    @cached_property
    def paths(self) -> list[str]:
        """The paths of all files of the commit."""
        assert self.commit
        try:
            listed = get_cached_repo_tree(self.name, repo_type=self.kind, revision=self.commit)
            return sorted(file.path for file in listed)
        except CachedRepoTreeNotFoundError:
            pass
        try:
            return sorted(self._listing)
        except UnreachableError:
            # Without the hub nobody knows whether a dataset in the cache is whole; a model's index tells.
            if self.kind == "dataset" or not any(self._snapshot.glob("*.safetensors")):
                raise
            logger.info("%s: the hub cannot be asked for the list of its files; taking those in the cache", self.name)
            return sorted(file.name for file in self._snapshot.iterdir())

    def files(self, wanted: Iterable[str]) -> dict[str, Path]:
        """Return where these files lie in the cache, each verified by its hash, after downloading those it lacks.

        Raises InputError where the hub refuses, the disk is too small, or what came is not what the hub announced; that
        is removed, and the next run downloads it again.
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
        # Asked first, because it tells a wrong name or commit, or a hub that is not there, at once.
        self._info(self.commit)
        entries = self._ask(
            lambda: list(HfApi().list_repo_tree(self.name, repo_type=self.kind, revision=self.commit, recursive=True))
        )
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        if strange := [path for path in files if path.startswith("/") or ".." in path.split("/")]:
            raise InputError(f"{self.name}: {strange[0]!r} would lie outside of its folder; use another repository")
        return files

    def _resolved(self) -> str:
        ref = self.folder / "refs" / (self.revision or constants.DEFAULT_REVISION)
        known = ref.read_text().strip() if ref.is_file() else None
        try:
            commit = str(self._info(self.revision).sha)
        except UnreachableError as unreachable:
            if not known:
                raise
            raise UnreachableError(
                f"{unreachable}; to use what the cache has of it, pin {self.section}: `revision: {known}`"
            ) from None
        if commit != known:  # for the other tools that use this cache
            with paths.whole_file(ref) as partial:
                partial.write_text(commit)
        return commit

    def _info(self, revision: str | None) -> Any:
        return self._ask(
            lambda: HfApi().repo_info(self.name, repo_type=self.kind, revision=revision, timeout=TIMEOUT_SECONDS),
            again=BUSY,
        )

    def _is_cached(self, path: str) -> bool:
        pointer = self._snapshot / path
        if not pointer.exists():
            return False
        # In the cache's layout a file is a link to a blob named by its hash; with links off nothing tells the hash.
        etag = pointer.readlink().name if pointer.is_symlink() else ""
        if (not COMMIT.fullmatch(etag) and not SHA256.fullmatch(etag)) or _hash(pointer, etag) == etag:
            return True
        logger.warning("%s: %s in the cache is damaged; it is removed", self.name, path)
        pointer.resolve().unlink()
        pointer.unlink()
        return False

    def _download(self, files: list[RepoFile]) -> None:
        self._require_space(
            sum(file.size - _size(self._partial(file)) for file in files if not _size(self._blob(file)))
        )
        for file in files:
            if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
                raise InputError(
                    f"{self.name}: {file.path} has {readable_bytes(file.size)}, more than the hub gives in one piece; "
                    f"run `hf download {self.name} --repo-type {self.kind} --revision {self.commit}` first"
                )
        with Progress(self.name, sum(file.size for file in files), unit="B", log_ends=True) as progress:
            for file in files:
                self._download_file(file, progress)
        # All blobs are there: this links them under their names, and keeps the listing for runs without a network.
        self._ask(
            lambda: snapshot_download(
                self.name,
                repo_type=self.kind,
                revision=self.commit,
                allow_patterns=[glob.escape(file.path) for file in files],
            )
        )

    def _download_file(self, file: RepoFile, progress: Progress) -> None:
        # The library's own download begins a file anew whenever its process was killed; hours of it may be lost.
        blob, partial = self._blob(file), self._partial(file)
        lock = Path(constants.HF_HUB_CACHE) / ".locks" / self.folder.name / f"{blob.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists() and _hash(blob, blob.name) == blob.name:  # of another commit
                progress.add(file.size)
                return
            if _size(partial) > file.size:
                partial.unlink()
            file_progress = _FileProgress(progress)
            self._ask(lambda: self._get(file, partial, file_progress), again=BROKEN_DOWN)
            if _hash(partial, blob.name) != blob.name:
                partial.unlink()
                raise InputError(
                    f"{self.name}: {file.path} came with another hash than the hub announced ({blob.name[:12]}…); it "
                    "is removed, run again to download it anew"
                )
            partial.replace(blob)

    def _get(self, file: RepoFile, partial: Path, progress: "_FileProgress") -> None:
        url = hf_hub_url(self.name, file.path, repo_type=self.kind, revision=self.commit)
        headers = {**build_hf_headers(library_name="lathe"), "Accept-Encoding": "identity"}
        with partial.open("ab") as target:
            try:
                # A redirect to another host is followed without the Authorization header.
                http_get(
                    url,
                    target,
                    resume_size=target.tell(),
                    headers=headers,
                    expected_size=file.size,
                    tqdm_class=progress,  # type: ignore[arg-type]
                )
            except OSError as error:
                if "Consistency check failed" not in str(error):  # how it tells of a size that is not the announced one
                    raise
                partial.unlink()
                raise InputError(
                    f"{self.name}: {file.path} came in another size than the hub announced ({file.size} bytes); it is "
                    "removed, run again to download it anew"
                ) from None

    def _blob(self, file: RepoFile) -> Path:
        return self.folder / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id)

    def _partial(self, file: RepoFile) -> Path:
        return self._blob(file).with_suffix(".incomplete")

    def _require_space(self, needed: int) -> None:
        folder = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{self.name} takes {readable_bytes(needed)} in {constants.HF_HUB_CACHE}, where {readable_bytes(free)} "
                "are free; free some, or set HF_HOME to a folder on a larger disk"
            )

    def _ask(self, action: Callable[[], Answer], again: frozenset[int] = frozenset()) -> Answer:
        waits = list(WAITS_SECONDS if again else ())
        while True:
            try:
                return action()
            except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError) as error:
                problem: BaseException = error
                if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
                    problem = error.__cause__
                seconds = _wait(problem, again, waits[0]) if waits else None
                if seconds is None:
                    raise self._refusal(problem) from None
                del waits[0]
                logger.warning("%s: %s; asking again in %.0f s", self.name, _first_line(problem), seconds)
                time.sleep(seconds)

    def _refusal(self, error: BaseException) -> InputError:
        page = f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        if isinstance(error, OfflineModeIsEnabled):
            return UnreachableError(
                f"{self.name}: the hub has to be asked, but HF_HUB_OFFLINE is set; unset it and run again"
            )
        if not isinstance(error, HfHubHTTPError):
            return UnreachableError(
                f"{self.name}: no answer from {constants.ENDPOINT} ({_first_line(error)}); check the network, and "
                "HTTPS_PROXY and HF_ENDPOINT where they are set"
            )
        status, with_token = error.response.status_code, get_token() is not None
        if isinstance(error, GatedRepoError):
            how = "with the account of your token" if with_token else "and set HF_TOKEN to a token of that account"
            return InputError(f"{self.name} is gated; accept its terms at {page} {how}")
        if isinstance(error, RevisionNotFoundError):
            return InputError(
                f"{self.name} has no revision {self.revision!r}; give a commit, tag or branch from {page}/commits/main"
            )
        if status in {401, 404} and not with_token:
            return InputError(
                f"{self.name}: no such {self.kind} on {constants.ENDPOINT}, or not a public one; check {self.id_key}, "
                f"or set HF_TOKEN to a token that may read it ({constants.ENDPOINT}/settings/tokens)"
            )
        if status == 401:
            return InputError(
                f"{self.name}: the hub does not accept the token of HF_TOKEN; make a new one at "
                f"{constants.ENDPOINT}/settings/tokens, or unset it for a public repository"
            )
        if status == 403:
            return InputError(
                f"{self.name}: the token of HF_TOKEN may not read it (403); give it read access at "
                f"{constants.ENDPOINT}/settings/tokens"
            )
        if status == 404:
            return InputError(
                f"{self.name}: no such {self.kind} on {constants.ENDPOINT}, or the account of HF_TOKEN may not see it; "
                f"check {self.id_key}"
            )
        if status == 429:
            seconds = error.response.headers.get("Retry-After")
            when = f"in {seconds} s" if seconds else "later"
            remedy = "" if with_token else "; with HF_TOKEN set the hub allows more"
            return InputError(f"{self.name}: the hub takes no more requests for now (429); run again {when}{remedy}")
        return InputError(
            f"{self.name}: the hub answers {status} ({error.response.reason_phrase}); run again later, what is "
            "downloaded is kept"
        )


class _FileProgress:
    """The bar of one file as http_get makes and uses it: it counts into the progress of all files."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.start = progress, progress.done

    def __call__(self, *, initial: int = 0, **_: object) -> "_FileProgress":
        self.progress.add(self.start + initial - self.progress.done)  # `initial` bytes are kept of a broken download
        return self

    def __enter__(self) -> "_FileProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        self.progress.add(count)


def _wait(error: BaseException, again: frozenset[int], default: float) -> float | None:
    """Return the seconds after which to ask again; None where that is of no use."""
    if isinstance(error, BROKEN):
        return default
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in again:
        return None
    asked = error.response.headers.get("Retry-After", "")
    seconds = float(asked) if asked.isdigit() else default
    return seconds if seconds <= LONGEST_WAIT_SECONDS else None


def _hash(file: Path, like: str) -> str:
    """Return the hash of a file of the kind that `like` is: SHA-256 of large files, Git's blob hash of the others."""
    if SHA256.fullmatch(like):
        with file.open("rb") as stream:
            return sha_fileobj(stream).hex()
    return git_hash(file.read_bytes())


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
