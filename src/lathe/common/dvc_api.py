"""DVC's Python packages: the only module that uses classes and functions which DVC does not document.

DVC promises its commands, not these. A contract test runs each function below on a small repository, so that a version
of DVC that differs fails there. DVC is imported when a function is called: loading the configuration must not take a
second.
"""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.common.text import summarize_error

if TYPE_CHECKING:
    from dvc.repo import Repo


class OverrideError(Exception):
    """An override that Hydra's grammar or DVC does not take; the message is its first line."""


@dataclass(frozen=True)
class ProcessNote:
    """A process that DVC noted, and when (seconds since 1970): a later one may have its number."""

    pid: int
    written: float


@dataclass(frozen=True)
class StageCommand:
    """A stage of dvc.yaml, each item of a matrix as its own: what it runs by a shell, and in which folder."""

    name: str
    commands: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class QueueTask:
    """An experiment of DVC's queue: `identifier` is its commit, `status` Queued, Running, Failed or Success.

    `log` is the file with what it prints; None before it has begun.
    """

    identifier: str
    name: str | None
    created: datetime
    status: str
    log: Path | None


class DvcRepository:
    """An open DVC repository; `open_repository` makes it. Paths are relative to its root."""

    def __init__(self, repo: "Repo") -> None:
        self._repo = repo
        self.root = Path(repo.root_dir)

    @property
    def config(self) -> Mapping[str, Any]:
        """The merged configuration, by section: `remote` (by name), `core`, `cache`."""
        config: Mapping[str, Any] = self._repo.config
        return config

    @property
    def local_config(self) -> Mapping[str, Any]:
        """What .dvc/config.local alone holds."""
        config: Mapping[str, Any] = self._repo.config.read("local")
        return config

    @property
    def cache_folder(self) -> Path:
        """The folder of the cache."""
        return Path(self._repo.cache.local_cache_dir)

    def cached_file(self, md5: str) -> Path:
        """Return the path of a hash in the cache, whether the cache has it or not."""
        return Path(self._repo.cache.local.oid_to_path(md5))

    def stage_names(self) -> set[str]:
        """Return the names of the stages in dvc.yaml, each item of a matrix as its own."""
        from dvc.stage import PipelineStage

        return {stage.name for stage in self._repo.index.stages if isinstance(stage, PipelineStage)}

    def list_commands(self) -> list[StageCommand]:
        """Return the stages of dvc.yaml, each after those that it depends on."""
        from dvc.repo.reproduce import plan_repro
        from dvc.stage import PipelineStage

        return [
            StageCommand(
                stage.name,
                (stage.cmd,) if isinstance(stage.cmd, str) else tuple(stage.cmd or ()),
                Path(stage.wdir),
            )
            for stage in plan_repro(self._repo.index.graph)
            if isinstance(stage, PipelineStage)
        ]

    def reproduce_alone(self, name: str) -> int:
        """Run one stage, or take its outputs from the cache if it has been run; return the exit code of its command.

        What it depends on is taken as it is. The current folder is the root, from which DVC reads the name.
        """
        from dvc.exceptions import ReproductionError
        from dvc.stage.exceptions import StageCmdFailedError

        log = logging.getLogger("dvc")
        log.setLevel(logging.WARNING)  # what to do with dvc.lock is not for whoever calls this
        log.propagate = False  # it has handlers of its own
        try:
            self._repo.reproduce(targets=[name], single_item=True)
        except ReproductionError as error:
            cause = error.__cause__ or error
            exited = re.search(r"exited with (-?\d+)$", str(cause))
            if isinstance(cause, StageCmdFailedError) and exited:
                return int(exited[1]) if int(exited[1]) > 0 else 128 - int(exited[1])
            raise InputError(f"dvc: {name}: {summarize_error(cause)}; mend it and run again", code="dvc") from None
        return 0

    def dependencies(self) -> set[str]:
        """Return the paths that any stage depends on, as dvc.yaml has them."""
        return {str(dep.def_path).rstrip("/") for stage in self._repo.index.stages for dep in stage.deps}

    def unpushed_outputs(self) -> set[str]:
        """Return the outputs with `push: false`, as dvc.yaml has them."""
        return {out.def_path for out in self._repo.index.outs if not out.can_push}

    def changed_sources(self) -> list[str]:
        """Return what `dvc add` tracks and whose contents have changed since."""
        tracked = [out for stage in self._repo.index.stages if stage.is_data_source for out in stage.outs]
        return [str(out) for out in tracked if out.exists and out.changed_checksum()]

    def hash_path(self, path: str) -> tuple[str, dict[str, str]] | None:
        """Return the hash of a file or folder and the hashes of a folder's files; None where nothing is there.

        DVC remembers the hash of a file by its time stamp.
        """
        from dvc.fs import localfs
        from dvc_data.hashfile.build import build
        from dvc_data.hashfile.tree import Tree

        target = self.root / path
        if not target.exists():
            return None
        cache, ignore = self._repo.cache.local, self._repo.dvcignore
        _, _, hashed = build(cache, str(target), localfs, "md5", dry_run=True, ignore=ignore)
        files = {}
        if isinstance(hashed, Tree):
            files = {"/".join(key): str(md5.value) for key, _, md5 in hashed if md5}
        return str(hashed.hash_info.value), files

    def checkout(self, paths: Sequence[str] | None = None) -> None:
        """Link outputs, all or those named, from the cache into the workspace, over what is there.

        What the cache lacks is left out.
        """
        self._repo.checkout(targets=None if paths is None else list(paths), force=True, allow_missing=True)

    def list_committed_outputs(self) -> dict[str, bool]:
        """Return the outputs of the stages that the last commit has, and of each whether the cache keeps it.

        The stages follow from params.yaml as well: one for each type of quantization.
        """
        from dvc.stage import PipelineStage

        with self._repo.switch("HEAD"):
            stages = [stage for stage in self._repo.index.stages if isinstance(stage, PipelineStage)]
            return {out.def_path: out.use_cache for stage in stages for out in stage.outs}

    def queued_experiments(self) -> list[str]:
        """Return the names of the experiments that wait in the queue or run from it."""
        queue = self._repo.experiments.celery_queue
        return [entry.name for entry in (*queue.iter_queued(), *queue.iter_active()) if entry.name]

    def list_queue(self) -> list[QueueTask]:
        """Return the experiments of the queue: those that wait, run, failed, or ended since the queue was cleared."""
        queue = self._repo.experiments.celery_queue
        tasks = []
        for entry in queue.status():
            try:
                log = queue.proc[entry["rev"]].stdout
            except KeyError:
                log = None
            made = entry["timestamp"]
            tasks.append(QueueTask(entry["rev"], entry["name"], made, entry["status"], Path(log) if log else None))
        return tasks

    def cache_experiment(self, commit: str) -> None:
        """Parse an experiment and keep the result, which `dvc exp show` reads."""
        from dvc.repo.experiments.collect import collect_rev

        collect_rev(self._repo, commit)

    def remote(self, name: str) -> "RemoteStorage":
        """Return the storage of a remote."""
        remote = self._repo.cloud.get_remote(name)
        return RemoteStorage(remote.fs, remote.path)

    def push_run_cache(self, name: str) -> list[Path]:
        """Upload the run cache to a remote; return the files that describe its runs."""
        pushed = self._repo.stage_cache.push(name)
        return [Path(self._repo.stage_cache.cache_dir, key[:2], key, run) for key, run in pushed]

    def list_sources(self) -> list[str]:
        """Return what `dvc add` tracks, by the paths of its .dvc files."""
        sources = [stage for stage in self._repo.index.stages if stage.is_data_source]
        return sorted(Path(stage.path).relative_to(self.root).as_posix() for stage in sources)

    def push_sources(self, name: str) -> int:
        """Upload what `dvc add` tracks, all of which must be in the cache; return how many files were not there."""
        targets = [str(self.root / source) for source in self.list_sources()]
        return int(self._repo.push(targets=targets, remote=name)) if targets else 0

    def fetch_sources(self, name: str) -> int:
        """Download into the cache what `dvc add` tracks; return how many files were not there."""
        targets = [str(self.root / source) for source in self.list_sources()]
        return int(self._repo.fetch(targets=targets, remote=name)) if targets else 0

    def fetch_files(self, hashes: Collection[str], name: str) -> tuple[int, int]:
        """Download files by their hashes into the cache; return how many were downloaded and how many it lacks still.

        DVC counts those that the remote does not have neither as the one nor as the other.
        """
        from dvc_data.hashfile.hash_info import HashInfo

        pulled = self._repo.cloud.pull([HashInfo("md5", md5) for md5 in hashes], remote=name)
        return len(pulled.transferred), sum(not self.cached_file(md5).exists() for md5 in hashes)

    def push_files(self, hashes: Collection[str], name: str) -> tuple[int, int]:
        """Upload cached files by their hashes; return how many were uploaded and how many failed."""
        from dvc_data.hashfile.hash_info import HashInfo

        pushed = self._repo.cloud.push([HashInfo("md5", md5) for md5 in hashes], remote=name)
        return len(pushed.transferred), len(pushed.failed)


class RemoteStorage:
    """The folder or bucket of a remote, through the file system that DVC itself uses for it."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs, self.root = fs, root

    def join(self, *parts: str) -> str:
        """Return a path below the remote's own."""
        return str(self._fs.join(self.root, *parts))

    def disable_retries(self) -> None:
        """Let each request to S3 be made once."""
        if self._fs.protocol == "s3":
            self._fs.fs_args.setdefault("config_kwargs", {})["retries"] = {"total_max_attempts": 1}
            self._fs.fs.retries = 1

    def exists(self, path: str) -> bool:
        """Tell whether there is a file or folder."""
        return bool(self._fs.exists(path))

    def write(self, path: str, content: bytes) -> None:
        """Write a file, and the folder that it is in."""
        self._fs.makedirs(self._fs.parent(path), exist_ok=True)
        self._fs.pipe_file(path, content)

    def list_files(self, folder: str) -> list[str]:
        """Return the names of the files in a folder."""
        return [str(self._fs.name(str(path))) for path in self._fs.find(folder)]

    def read(self, path: str, most_bytes: int) -> bytes:
        """Return the contents of a file, of which no more is asked for than so many bytes."""
        return bytes(self._fs.cat_file(path, start=0, end=most_bytes))

    def delete_file(self, path: str) -> None:
        """Delete a file."""
        self._fs.rm([path])

    def delete_folder(self, folder: str) -> None:
        """Delete an empty folder: on a disk it exists by itself, in S3 it does not."""
        if self._fs.exists(folder):
            self._fs.rmdir(folder)


@contextmanager
def open_repository(root: Path, config: Mapping[str, Any] | None = None) -> Iterator[DvcRepository]:
    """Open the DVC repository at `root`; DVC's own errors, also those of the block, become an InputError.

    `config` are settings by section over those of its files, such as a remote that they do not name.
    """
    from dvc.repo import Repo

    with translate_errors(), Repo(str(root), config=config) as repo:
        yield DvcRepository(repo)


@contextmanager
def check_host_keys(known_hosts: Sequence[str]) -> Iterator[None]:
    """Let remotes over ssh refuse, during the block, a host whose key is not in one of these files.

    By itself dvc-ssh accepts any key, and hands the host the user's agent.
    """
    from dvc_ssh import SSHFileSystem

    original = SSHFileSystem._prepare_credentials

    def prepare(self: Any, **config: Any) -> dict[str, Any]:
        return {**original(self, **config), "known_hosts": list(known_hosts), "agent_forwarding": False}

    SSHFileSystem._prepare_credentials = prepare
    try:
        yield
    finally:
        SSHFileSystem._prepare_credentials = original


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn DVC's errors, such as that of a damaged dvc.yaml, into an InputError of one line."""
    from dvc.exceptions import DvcException

    try:
        yield
    except DvcException as error:
        text = " ".join(str(error).split())
        raise InputError(f"dvc: {text}; mend it and run again", code="dvc") from None


def read_config(root: Path) -> Mapping[str, Any]:
    """Return DVC's merged configuration of a checkout, which need not be whole otherwise."""
    from dvc.config import Config

    with translate_errors():
        config: Mapping[str, Any] = Config(str(root / ".dvc"))
    return config


def update_local_config(root: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Add settings by section to .dvc/config.local of a checkout."""
    from dvc.config import Config

    with translate_errors(), Config(str(root / ".dvc")).edit("local") as config:
        for section, values in settings.items():
            config.setdefault(section, {}).update(values)


def run_command(arguments: Sequence[str]) -> int:
    """Run a command of DVC in this process; return its exit code."""
    from dvc.cli import main

    from lathe.common.dvc_yaml import use_libyaml

    use_libyaml()
    logging.getLogger("dvc").propagate = False  # it has handlers of its own, which print what is meant for the user
    return int(main(list(arguments)))


def find_experiment_note(root: Path) -> ProcessNote | None:
    """Return the note about the process that runs an experiment in the workspace, or was killed while it did."""
    return _read_note(root / ".dvc/tmp/exps/run/workspace/workspace.json", ())


def find_stash_note(root: Path) -> ProcessNote | None:
    """Return the note about a process that prepares an experiment, with the workspace in Git's stash, or was killed."""
    return _read_note(root / ".dvc/tmp/exps/rwlock", ("write", "workspace"))


def _read_note(file: Path, place: Sequence[str]) -> ProcessNote | None:
    try:
        tree, written = json.loads(file.read_text(encoding="utf-8")), file.stat().st_mtime
        for key in place:
            tree = tree[key]
        return ProcessNote(int(tree["pid"]), written)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_link_types(cache: Path, workspace_file: Path) -> list[str]:
    """Return which of reflink, hardlink, symlink and copy work from the folder `cache` to beside `workspace_file`."""
    from dvc_objects.fs.generic import test_links
    from dvc_objects.fs.local import localfs

    kinds = ["reflink", "hardlink", "symlink", "copy"]
    return list(test_links(kinds, localfs, str(cache), localfs, str(workspace_file)))


def read_lock(file: Path) -> dict[str, Any]:
    """Return the content of a dvc.lock, which DVC in this process then reads at no cost; {} if it cannot be read."""
    from lathe.common.dvc_yaml import texts

    try:
        content = texts.parse(file.read_text(encoding="utf-8"), file)
    except Exception:  # whatever a damaged one is: DVC has words for it
        return {}
    return content if isinstance(content, dict) and is_complete_lock(content) else {}


def is_complete_lock(tree: Any) -> bool:
    """Tell whether the content of a dvc.lock has the form that DVC reads."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(tree)
    except Invalid:
        return False
    return True


def apply_overrides(file: Path, overrides: Sequence[str]) -> None:
    """Set keys of a YAML file as `dvc exp run -S` does. Raises OverrideError."""
    from dvc.utils import hydra

    with _translate_override_errors():
        hydra.apply_overrides(file, overrides)


def expand_sweep(overrides: Sequence[str], file: str) -> list[list[str]]:
    """Return the overrides of each run of a sweep over a parameter file, in DVC's order. Raises OverrideError."""
    from dvc.utils import hydra

    with _translate_override_errors():
        if not any(override.is_sweep_override() for override in hydra.to_hydra_overrides(list(overrides))):
            return [list(overrides)]
        return [run[file] for run in hydra.get_hydra_sweeps({file: list(overrides)})]


@contextmanager
def _translate_override_errors() -> Iterator[None]:
    from dvc.exceptions import DvcException
    from hydra.errors import OverrideParseException

    try:
        yield
    except (DvcException, OverrideParseException) as error:
        raise OverrideError(summarize_error(error.__cause__ or error)) from None
