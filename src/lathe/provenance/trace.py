"""Trace: which commit or experiment made a GGUF, and what in the workspace differs from it.

The file is found by its hash in every `dvc.lock` that Git knows, those of experiments included, so its name and folder
do not matter. From the stage that wrote it the trace goes upstream through that lock, and compares each
recorded dependency and parameter with the workspace.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lathe.common import dotted_keys, paths
from lathe.common.dvc_api import open_repository
from lathe.common.errors import InputError
from lathe.common.git import try_git
from lathe.common.progress import Progress
from lathe.common.text import write_lines
from lathe.config.yaml_files import read_yaml
from lathe.gguf.description import describe_gguf
from lathe.gguf.tensor_types import list_file_types
from lathe.provenance import lineage, local_files
from lathe.provenance.dvc_lock import read_listing, read_locked_stages
from lathe.provenance.revisions import list_experiments

_COMMITS_AT_ONCE = 200  # whose dvc.lock is in memory at a time
_FILES_SHOWN = 5

# Refs that DVC keeps for itself: they point to no result.
_NOT_RESULTS = ("stash", "stash/*", "celery/*", "exec/*", "apply/*", "temp/*")


@dataclass(frozen=True)
class TracedCommit:
    """A commit whose dvc.lock has the file as an output; `experiment` is its name if it is one of DVC's."""

    commit: str
    date: str
    subject: str
    experiment: str | None


@dataclass(frozen=True)
class WorkspaceChange:
    """Something that differs now: `kind` is parameter, preset, data, model, code, measurement or file."""

    kind: str
    name: str
    then: Any
    now: Any
    files: list[str] = field(default_factory=list)  # of a folder those that differ, if that is known


@dataclass
class Trace:
    """The origin of a GGUF file, as far as it is known.

    `holds` says what the commits have as an output: the file itself, or else the adapter or the base that its metadata
    names.
    """

    path: str
    bytes: int
    md5: str
    type: str
    bits_per_weight: float
    facts: dict[str, str]  # the `lathe.*` keys, without that prefix
    template_sha256: str | None
    holds: str | None = None
    stage: str | None = None
    made_as: str | None = None
    in_workspace: bool = False
    commits: list[TracedCommit] = field(default_factory=list)
    compared_with: str | None = None
    differences: list[WorkspaceChange] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # recorded, and not in the workspace to be compared
    broken: list[str] = field(default_factory=list)  # made again by a later run than the one that read it


def run(file: Path, *, as_json: bool) -> None:
    """Trace a GGUF and print the result."""
    traced = trace(file)
    if as_json:
        sys.stdout.write(json.dumps(asdict(traced), indent=2, ensure_ascii=False) + "\n")
    else:
        write_lines(_format_trace(traced))


def trace(file: Path) -> Trace:
    """Trace a GGUF to its origin. Raises InputError if it is none, is damaged, or was not made by Lathe."""
    described = describe_gguf(file)
    facts = {
        key.removeprefix("lathe."): value
        for key, value in described["metadata"].items()
        if key.startswith("lathe.") and isinstance(value, str)
    }
    if not facts:
        raise InputError(
            f"{file}: not made by Lathe: it carries no lathe.* key; trace one that the pipeline made",
            code="no-lineage",
        )
    template = described["chat_template"]
    with Progress("trace", described["bytes"], unit="B") as progress:
        md5 = lineage.hash_path(file, progress.add)
    traced = Trace(
        path=str(file),
        bytes=described["bytes"],
        md5=md5,
        type=_name_type(described["metadata"].get("general.file_type")),
        bits_per_weight=described["bits_per_weight"],
        facts=facts,
        template_sha256=hashlib.sha256(template.encode()).hexdigest() if template else None,
    )
    _find_origin(traced)
    return traced


def _name_type(number: Any) -> str:
    names = {value: name for name, value in list_file_types().items()}
    return names.get(number, f"type {number}")


def _find_origin(traced: Trace) -> None:
    lock = paths.ROOT / "dvc.lock"
    current = lock.read_bytes() if lock.exists() else b""
    wanted = {"file": traced.md5}
    wanted |= {name: traced.facts[f"{name}.digest"] for name in ("adapter", "base") if f"{name}.digest" in traced.facts}
    hashes_of = _find_locks(list(wanted.values()))
    for name, md5 in wanted.items():
        commits = [commit for commit, hashes in hashes_of.items() if md5 in hashes]
        if commits or _is_output(current, md5):
            traced.holds, traced.in_workspace = name, _is_output(current, md5)
            traced.commits = _describe_commits(commits)
            break
    if traced.holds == "file":
        # The workspace's own lock first: what has been edited and run again since counts as equal.
        text = current.decode() if traced.in_workspace else _read_lock(traced.commits[0].commit)
        traced.compared_with = "dvc.lock" if traced.in_workspace else traced.commits[0].commit
        _compare_with_lock(traced, read_locked_stages(text))
    else:
        _compare_with_metadata(traced)


# Git


def _find_locks(hashes: Sequence[str]) -> dict[str, set[str]]:
    """Return the commits, newest first, whose dvc.lock has one of the hashes as an output, each with those it has.

    All commits count that a branch, a tag or an experiment reaches.
    """
    no_results = [f"--exclude=refs/exps/{pattern}" for pattern in _NOT_RESULTS]
    listed = _run_git("rev-list", "--full-history", *no_results, "--all", "HEAD", "--", "dvc.lock")
    changing = listed.decode().split()
    prefix = _run_git("rev-parse", "--show-prefix").decode().strip()
    commits = list(dict.fromkeys([*(experiment.commit for experiment in list_experiments()), *changing]))
    names = "".join(f"{commit}:{prefix}dvc.lock\n" for commit in commits)
    blobs = _run_git("cat-file", "--batch-check", stdin=names).decode().splitlines()
    blob_of = {
        commit: line.split()[0] for commit, line in zip(commits, blobs, strict=False) if not line.endswith(" missing")
    }
    outputs: dict[str, set[str]] = {}
    unique = list(dict.fromkeys(blob_of.values()))
    for start in range(0, len(unique), _COMMITS_AT_ONCE):
        for blob, lock in _read_blobs(unique[start : start + _COMMITS_AT_ONCE]):
            outputs[blob] = {md5 for md5 in hashes if _is_output(lock, md5)}
    order = {commit: number for number, commit in enumerate(changing)}
    matching = {commit: outputs[blob] for commit, blob in blob_of.items() if outputs[blob]}
    return dict(sorted(matching.items(), key=lambda item: order.get(item[0], -1)))


def _read_blobs(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield Git's objects with their contents, as `git cat-file --batch` prints them."""
    printed = _run_git("cat-file", "--batch", stdin="".join(f"{name}\n" for name in names))
    position = 0
    while position < len(printed):
        end = printed.index(b"\n", position)
        name, _, size = printed[position:end].decode().split()
        position = end + 1 + int(size)
        yield name, printed[end + 1 : position]
        position += 1


def _is_output(lock: bytes, md5: str) -> bool:
    """Tell whether a dvc.lock has the hash as an output, not as a dependency alone.

    By the layout that DVC writes: parsing 500 locks as YAML would take half a minute.
    """
    position = -1
    while (position := lock.find(f"\n      md5: {md5}\n".encode(), position + 1)) != -1:
        if lock.rfind(b"\n    outs:\n", 0, position) > lock.rfind(b"\n    deps:\n", 0, position):
            return True
    return False


def _read_lock(commit: str) -> str:
    return _run_git("show", f"{commit}:./dvc.lock").decode()


def _describe_commits(commits: Sequence[str]) -> list[TracedCommit]:
    if not commits:
        return []
    experiments = {experiment.commit: experiment.name for experiment in list_experiments()}
    printed = _run_git("log", "--no-walk=unsorted", "--format=%H%x00%cI%x00%s", "--stdin", stdin="\n".join(commits))
    rows = (line.split("\0") for line in printed.decode(errors="replace").split("\n") if line)
    return [TracedCommit(commit, date, subject, experiments.get(commit)) for commit, date, subject in rows]


def _run_git(*arguments: str, stdin: str = "") -> bytes:
    # Nothing where there is no repository or no commit: the metadata of the file is shown all the same.
    return try_git(*arguments, stdin=stdin) or b""


# The workspace


def _compare_with_lock(traced: Trace, stages: Mapping[str, Any]) -> None:
    # The last one: dvc.lock keeps entries of stages that dvc.yaml no longer has.
    *_, (traced.stage, out) = (
        (name, out) for name, stage in stages.items() for out in stage.get("outs", []) if out["md5"] == traced.md5
    )
    traced.made_as = out["path"]
    upstream, traced.broken = _find_upstream(stages, traced.stage)
    outputs = {out["path"] for stage in stages.values() for out in stage.get("outs", [])}
    recorded = {dep["path"]: dep["md5"] for name in reversed(upstream) for dep in stages[name].get("deps", [])}
    with open_repository(paths.ROOT) as repo:
        for path, md5 in recorded.items():
            hashed = repo.hash_path(path)
            if hashed is None and path in outputs:
                traced.missing.append(path)
            elif hashed is None or hashed[0] != md5:
                readers = [stages[name] for name in upstream if path in _list_read(stages[name])]
                if all(local_files.is_unrelated_change(reader, path) for reader in readers):
                    continue
                now, listing = hashed or (None, {})
                files = _list_changed_files(read_listing(repo, md5) if md5.endswith(".dir") else None, listing)
                if not files and _classify(path) == "code":
                    files = _list_changed_code(path, traced.compared_with)
                traced.differences.append(WorkspaceChange(_classify(path), path, md5, now, files))
        hashed = repo.hash_path(traced.made_as)
    if hashed is None:
        traced.missing.append(traced.made_as)
    elif hashed[0] != traced.md5:
        traced.differences.append(WorkspaceChange("file", traced.made_as, traced.md5, hashed[0]))
    then: dict[str, dict[str, Any]] = {}
    for name in upstream:
        if local_files.is_look(stages[name]):
            continue
        for file, values in stages[name].get("params", {}).items():
            then.setdefault(file, {}).update(values)
    traced.differences += _compare_parameters(then)


def _list_read(stage: Mapping[str, Any]) -> list[str]:
    return [dep["path"] for dep in stage.get("deps", [])]


def _find_upstream(stages: Mapping[str, Any], last: str) -> tuple[list[str], list[str]]:
    """Return the stages that lead to `last`, itself first, and the paths that were made again after they were read."""
    outs = [(out["path"], out["md5"], name) for name, stage in stages.items() for out in stage.get("outs", [])]
    order, broken, waiting = [last], [], [last]
    while waiting:
        for dep in stages[waiting.pop()].get("deps", []):
            path, md5 = dep["path"], dep["md5"]
            same = [name for out, hash_, name in outs if out == path and hash_ == md5]
            makers = same[-1:] or [name for out, _, name in outs if out == path][-1:]
            if makers and not same:
                broken.append(path)
            makers = makers or [name for out, _, name in outs if _is_within(path, out) or _is_within(out, path)]
            for name in makers:
                if name not in order:
                    order.append(name)
                    waiting.append(name)
    return order, broken


def _is_within(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _classify(path: str) -> str:
    return {"data": "data", "models": "model", "metrics": "measurement"}.get(path.split("/")[0], "code")


def _list_changed_files(then: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    if then is None:
        return []
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _list_changed_code(path: str, commit: str | None) -> list[str]:
    if not (paths.ROOT / path).is_dir():
        return []
    since = "HEAD" if commit in (None, "dvc.lock") else str(commit)
    return _run_git("diff", "--name-only", "--relative", since, "--", path).decode().split("\n")[:-1]


def _compare_parameters(then: Mapping[str, Mapping[str, Any]]) -> list[WorkspaceChange]:
    changes = []
    selected = read_yaml(paths.PARAMS)
    for file, values in sorted(then.items()):
        tree = read_yaml(paths.ROOT / file) if (paths.ROOT / file).exists() else {}
        for key, value in sorted(values.items()):
            # The name of a preset has no dot, so a dot always separates a section from a key.
            if file == paths.PRESETS.name:
                table, name = key.split(".", 1)
                chosen = selected[table.removesuffix("s")]
                if chosen != name:
                    changes.append(WorkspaceChange("preset", table.removesuffix("s"), name, chosen))
                    continue
            kind = "preset" if file == paths.PRESETS.name else "parameter"
            before, after = ({key: value}, {key: dotted_keys.get_value(tree, key)})
            differing = dotted_keys.compare(dotted_keys.flatten(before), dotted_keys.flatten(after))
            changes += [WorkspaceChange(kind, leaf, *both) for leaf, both in sorted(differing.items())]
    # One stage may read a section and another a key of it.
    return list({(change.kind, change.name): change for change in changes}.values())


def _compare_with_metadata(traced: Trace) -> None:
    """Compare the digests in the file's metadata with the workspace, for lack of its dvc.lock."""
    places = {
        "base": ("model", paths.MODEL_BASE),
        "dataset": ("data", paths.DATA_PROCESSED),
        "adapter": ("model", paths.MODEL_ADAPTER),
    }
    with open_repository(paths.ROOT) as repo:
        for name, (kind, place) in places.items():
            then, path = traced.facts.get(f"{name}.digest"), place.relative_to(paths.ROOT).as_posix()
            if then is None:
                continue
            hashed = repo.hash_path(path)
            if hashed is None:
                traced.missing.append(path)
            elif hashed[0] != then:
                files = _list_changed_files(read_listing(repo, then), hashed[1])
                traced.differences.append(WorkspaceChange(kind, path, then, hashed[0], files))
    then = traced.facts.get("parameters.digest")
    if then and traced.facts.get("artifact") in ("base", "adapter", "merged"):
        now = lineage.digest_parameters(lineage.select_parameters(traced.facts["artifact"]))
        if now != then:
            traced.differences.append(WorkspaceChange("parameter", "one or more, upstream of the file", then, now))


# Output


def _format_trace(traced: Trace) -> Iterator[str]:
    facts = traced.facts
    yield f"file        {traced.path}: {traced.bytes:,} bytes, md5 {traced.md5}"
    yield f"type        {traced.type}, {traced.bits_per_weight:g} bits per weight"
    artifact = facts.get("artifact", "unknown")
    source = "the adapter alone" if artifact == "adapter" else f"{artifact} model"
    yield f"made from   {source}, by Lathe {facts.get('version', '(unknown version)')}"
    for name in ("adapter", "dataset", "base"):
        if any(key.startswith(f"{name}.") for key in facts):
            yield f"{name:<12}{_format_source(facts, name)}"
    yield f"parameters  digest {facts.get('parameters.digest', 'unknown')}"
    yield f"template    {'sha256 ' + traced.template_sha256 if traced.template_sha256 else 'none'}"
    yield ""
    yield from _format_origin(traced)
    if traced.broken:
        yield f"dvc.lock there is of several runs: {', '.join(traced.broken)} was made again later"
    yield ""
    against = {None: "its metadata", "dvc.lock": "the workspace's dvc.lock"}.get(
        traced.compared_with, f"commit {str(traced.compared_with)[:10]}"
    )
    if traced.differences:
        yield f"no longer matches in this workspace (compared with {against}):"
        for change in traced.differences:
            yield f"  {change.kind:<12}{format_change(change)}"
    else:
        yield f"nothing in this workspace differs (compared with {against})"
    if traced.missing:
        yield f"not here to compare (`dvc pull` brings it): {', '.join(traced.missing)}"


def _format_source(facts: Mapping[str, str], name: str) -> str:
    keys = {key: facts.get(f"{name}.{key}") for key in ("name", "source", "id", "revision", "commit", "digest")}
    parts = [keys["name"]] if keys["name"] else []
    if keys["source"]:
        parts.append(f"({keys['source']})")
    parts += [f"{key} {keys[key]}" for key in ("id", "revision", "commit", "digest") if keys[key]]
    return " ".join(part for part in parts if part)


def _format_origin(traced: Trace) -> Iterator[str]:
    if traced.holds is None:
        yield "no dvc.lock that this repository knows holds the file, its adapter or its base"
        return
    if traced.holds == "file":
        yield f"made by     stage {traced.stage}, as {traced.made_as}"
    else:
        yield f"no dvc.lock that this repository knows holds the file; its {traced.holds} is in that of"
    if traced.in_workspace:
        yield "in          the workspace's dvc.lock"
    for commit in (commit for commit in traced.commits if commit.experiment):
        yield f"experiment  {commit.experiment} ({commit.commit[:10]}, {commit.date})"
    commits = [commit for commit in traced.commits if not commit.experiment]
    if commits:
        yield f"commit      {commits[-1].commit[:10]} {commits[-1].subject} ({commits[-1].date})"
    if len(commits) > 1:
        yield f"            and {len(commits) - 1} later with another dvc.lock, the last {commits[0].commit[:10]}"


def format_change(change: WorkspaceChange) -> str:
    """Return what differs now, on one line."""
    if change.kind in ("parameter", "preset"):
        then, now = (json.dumps(value, ensure_ascii=False) for value in (change.then, change.now))
        return f"{change.name}: {then} -> {now}"
    if change.now is None:
        return f"{change.name}: gone"
    if change.kind == "file":
        return f"{change.name}: another file is there"
    files = ", ".join(change.files[:_FILES_SHOWN])
    more = f" and {len(change.files) - _FILES_SHOWN} more" if len(change.files) > _FILES_SHOWN else ""
    return f"{change.name}: changed{f' ({files}{more})' if files else ''}"
