"""Where a GGUF comes from: what it says itself, which commit or experiment made it, and what no longer matches that.

The file is looked for by the hash of its bytes in every `dvc.lock` that Git knows, the experiments' included, so its
name and folder do not matter. From the stage that wrote it the lock is walked upstream, and each dependency and
parameter recorded there is compared with the workspace.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.config.yaml_files import read_yaml
from lathe.gguf import header
from lathe.gguf.tensor_types import quant_types
from lathe.provenance import lineage, revisions
from lathe.provenance.dvc_lock import cached_listing, locked_stages, one_line_of_dvc

_COMMITS_AT_ONCE = 200  # of which dvc.lock is held in memory
_NAMES_SHOWN = 5

# Refs that DVC keeps for itself: what they point to is no result.
_NOT_RESULTS = ("stash", "stash/*", "celery/*", "exec/*", "apply/*", "temp/*")


@dataclass(frozen=True)
class Commit:
    """A commit whose dvc.lock holds the file; `experiment` where it is one of DVC's."""

    commit: str
    date: str
    subject: str
    experiment: str | None


@dataclass(frozen=True)
class Difference:
    """What no longer matches: `kind` is parameter, preset, data, model, code, measurement or file."""

    kind: str
    name: str
    then: Any
    now: Any
    files: list[str] = field(default_factory=list)  # of a folder those that differ, where that is known


@dataclass
class Trace:
    """Everything that is known of a file; `holds` says what of it the commits hold: the file or its adapter or base."""

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
    commits: list[Commit] = field(default_factory=list)
    compared_with: str | None = None
    differences: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # recorded, and not here: neither changed nor unchanged
    broken: list[str] = field(default_factory=list)  # where the lock's own stages do not fit together


def run(file: Path, *, as_json: bool) -> None:
    """Trace a GGUF and print what is found."""
    found = trace(file)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(found)) + "\n")


def trace(file: Path) -> Trace:
    """Find out where a GGUF comes from. Raises InputError if it is none, is damaged, or is none of Lathe's."""
    described = header.describe(file)
    facts = {
        key.removeprefix("lathe."): value
        for key, value in described["metadata"].items()
        if key.startswith("lathe.") and isinstance(value, str)
    }
    if not facts:
        raise InputError(f"{file}: not made by Lathe: it carries no lathe.* key; trace one that the pipeline made")
    template = described["chat_template"]
    with Progress("trace", described["bytes"], unit="B") as progress:
        md5 = lineage.digest(file, progress.add)
    found = Trace(
        path=str(file),
        bytes=described["bytes"],
        md5=md5,
        type=_type(described["metadata"].get("general.file_type")),
        bits_per_weight=described["bits_per_weight"],
        facts=facts,
        template_sha256=hashlib.sha256(template.encode()).hexdigest() if template else None,
    )
    with one_line_of_dvc():
        _find(found)
    return found


def _type(number: Any) -> str:
    names = {value: name for name, value in quant_types().items()}
    return names.get(number, f"type {number}")


def _find(found: Trace) -> None:
    own = paths.ROOT / "dvc.lock"
    here = own.read_bytes() if own.exists() else b""
    wanted = {"file": found.md5}
    wanted |= {name: found.facts[f"{name}.digest"] for name in ("adapter", "base") if f"{name}.digest" in found.facts}
    locks = _locks_with(list(wanted.values()))
    for name, md5 in wanted.items():
        commits = [commit for commit, held in locks.items() if md5 in held]
        if commits or _made(here, md5):
            found.holds, found.in_workspace = name, _made(here, md5)
            found.commits = _describe(commits)
            break
    if found.holds == "file":
        # The nearest one: what has been edited and run again since counts as matching.
        text = here.decode() if found.in_workspace else _lock_of(found.commits[0].commit)
        found.compared_with = "dvc.lock" if found.in_workspace else found.commits[0].commit
        _compare_with_lock(found, locked_stages(text))
    else:
        _compare_with_metadata(found)


# Git


def _git(*arguments: str, given: str = "") -> bytes:
    """What Git prints; nothing where there is no repository, no commit or no Git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=paths.ROOT, input=given.encode(), capture_output=True, check=False
        )
    except FileNotFoundError:
        return b""
    return done.stdout if done.returncode == 0 else b""


def _locks_with(hashes: Sequence[str]) -> dict[str, set[str]]:
    """Of all commits that any branch, tag or experiment reaches, newest first, those whose dvc.lock holds a hash."""
    no_results = [f"--exclude=refs/exps/{pattern}" for pattern in _NOT_RESULTS]
    changing = _git("rev-list", "--full-history", *no_results, "--all", "HEAD", "--", "dvc.lock").decode().split()
    prefix = _git("rev-parse", "--show-prefix").decode().strip()
    commits = list(dict.fromkeys([*(each.commit for each in revisions.experiments()), *changing]))
    blobs = _git("cat-file", "--batch-check", given="".join(f"{commit}:{prefix}dvc.lock\n" for commit in commits))
    of_commit = {
        commit: line.split()[0]
        for commit, line in zip(commits, blobs.decode().splitlines(), strict=False)
        if not line.endswith(" missing")
    }
    held: dict[str, set[str]] = {}
    unique = list(dict.fromkeys(of_commit.values()))
    for begin in range(0, len(unique), _COMMITS_AT_ONCE):
        for blob, text in _blobs(unique[begin : begin + _COMMITS_AT_ONCE]):
            held[blob] = {md5 for md5 in hashes if _made(text, md5)}
    order = {commit: number for number, commit in enumerate(changing)}
    found = {commit: held[blob] for commit, blob in of_commit.items() if held[blob]}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], -1)))


def _blobs(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The contents of Git's objects, in the form of `git cat-file --batch`."""
    printed = _git("cat-file", "--batch", given="".join(f"{name}\n" for name in names))
    at = 0
    while at < len(printed):
        end = printed.index(b"\n", at)
        name, _, size = printed[at:end].decode().split()
        at = end + 1 + int(size)
        yield name, printed[end + 1 : at]
        at += 1


def _made(lock: bytes, md5: str) -> bool:
    """Whether a dvc.lock has the hash among its outputs: where it is only read, it is of an earlier run.

    By the layout that DVC writes: reading 500 locks as YAML would take half a minute.
    """
    at = -1
    while (at := lock.find(f"\n      md5: {md5}\n".encode(), at + 1)) != -1:
        if lock.rfind(b"\n    outs:\n", 0, at) > lock.rfind(b"\n    deps:\n", 0, at):
            return True
    return False


def _lock_of(commit: str) -> str:
    return _git("show", f"{commit}:./dvc.lock").decode()


def _describe(commits: Sequence[str]) -> list[Commit]:
    if not commits:
        return []
    experiments = {each.commit: each.name for each in revisions.experiments()}
    printed = _git("log", "--no-walk=unsorted", "--format=%H%x00%cI%x00%s", "--stdin", given="\n".join(commits))
    rows = (line.split("\0") for line in printed.decode(errors="replace").splitlines())
    return [Commit(commit, date, subject, experiments.get(commit)) for commit, date, subject in rows]


# The workspace


def _compare_with_lock(found: Trace, stages: Mapping[str, Any]) -> None:
    from dvc.repo import Repo

    # The last one: of stages that dvc.yaml no longer has, dvc.lock keeps what it held.
    *_, (found.stage, out) = (
        (name, out) for name, stage in stages.items() for out in stage.get("outs", []) if out["md5"] == found.md5
    )
    found.made_as = out["path"]
    upstream, found.broken = _upstream(stages, found.stage)
    made = {out["path"] for stage in stages.values() for out in stage.get("outs", [])}
    recorded = {dep["path"]: dep["md5"] for name in reversed(upstream) for dep in stages[name].get("deps", [])}
    with Repo(str(paths.ROOT)) as repo:
        for path, md5 in recorded.items():
            found_now = _hash_now(repo, path)
            if found_now is None and path in made:
                found.missing.append(path)
            elif found_now is None or found_now[0] != md5:
                now, listing = found_now or (None, {})
                files = _changed_files(cached_listing(repo, md5) if md5.endswith(".dir") else None, listing)
                if not files and _kind(path) == "code":
                    files = _changed_code(path, found.compared_with)
                found.differences.append(Difference(_kind(path), path, md5, now, files))
        itself = _hash_now(repo, found.made_as)
    if itself is None:
        found.missing.append(found.made_as)
    elif itself[0] != found.md5:
        found.differences.append(Difference("file", found.made_as, found.md5, itself[0]))
    then: dict[str, dict[str, Any]] = {}
    for name in upstream:
        for file, values in stages[name].get("params", {}).items():
            then.setdefault(file, {}).update(values)
    found.differences += _parameter_differences(then)


def _upstream(stages: Mapping[str, Any], last: str) -> tuple[list[str], list[str]]:
    """The stages that lead to `last`, itself first; and what one of them read that none of them wrote."""
    outs = [(out["path"], out["md5"], name) for name, stage in stages.items() for out in stage.get("outs", [])]
    order, broken, waiting = [last], [], [last]
    while waiting:
        for dep in stages[waiting.pop()].get("deps", []):
            path, md5 = dep["path"], dep["md5"]
            same = [name for out, hash_, name in outs if out == path and hash_ == md5]
            makers = same[-1:] or [name for out, _, name in outs if out == path][-1:]
            if makers and not same:
                broken.append(path)
            makers = makers or [name for out, _, name in outs if _within(path, out) or _within(out, path)]
            for name in makers:
                if name not in order:
                    order.append(name)
                    waiting.append(name)
    return order, broken


def _within(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _kind(path: str) -> str:
    return {"data": "data", "models": "model", "metrics": "measurement"}.get(path.split("/")[0], "code")


def _hash_now(repo: Any, path: str) -> tuple[str, dict[str, str]] | None:
    """DVC's hash of what lies there now, by time stamp from DVC's own memory, and the files of a folder."""
    from dvc.fs import localfs
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.tree import Tree

    here = paths.ROOT / path
    if not here.exists():
        return None
    _, _, hashed = build(repo.cache.local, str(here), localfs, "md5", dry_run=True, ignore=repo.dvcignore)
    assert hashed.hash_info.value
    listing = {}
    if isinstance(hashed, Tree):
        listing = {"/".join(key): str(md5.value) for key, _, md5 in hashed if md5}
    return hashed.hash_info.value, listing


def _changed_files(then: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    if then is None:
        return []
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _changed_code(path: str, commit: str | None) -> list[str]:
    if not (paths.ROOT / path).is_dir():
        return []
    since = "HEAD" if commit in (None, "dvc.lock") else str(commit)
    return _git("diff", "--name-only", "--relative", since, "--", path).decode().split("\n")[:-1]


def _parameter_differences(then: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    differences = []
    selected = read_yaml(paths.PARAMS)
    for file, values in sorted(then.items()):
        tree = read_yaml(paths.ROOT / file) if (paths.ROOT / file).exists() else {}
        for key, value in sorted(values.items()):
            now = tree
            # A preset's own name may hold no dot, so that a dot always parts a section from a key.
            for step in key.split("."):
                now = now.get(step) if isinstance(now, dict) else None
            if file == paths.PRESETS.name:
                table, name = key.split(".", 1)
                chosen = selected[table.removesuffix("s")]
                if chosen != name:
                    differences.append(Difference("preset", table.removesuffix("s"), name, chosen))
                    continue
            leaves, leaves_now = dict(_leaves(key, value)), dict(_leaves(key, now))
            for leaf in sorted(leaves.keys() | leaves_now.keys()):
                if leaves.get(leaf) != leaves_now.get(leaf):
                    kind = "preset" if file == paths.PRESETS.name else "parameter"
                    differences.append(Difference(kind, leaf, leaves.get(leaf), leaves_now.get(leaf)))
    return differences


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _compare_with_metadata(found: Trace) -> None:
    """Compare the digests in the file with the workspace: all that can be done where its dvc.lock is unknown."""
    from dvc.repo import Repo

    places = {
        "base": ("model", paths.MODEL_BASE),
        "dataset": ("data", paths.DATA_PROCESSED),
        "adapter": ("model", paths.MODEL_ADAPTER),
    }
    with Repo(str(paths.ROOT)) as repo:
        for name, (kind, place) in places.items():
            then, path = found.facts.get(f"{name}.digest"), place.relative_to(paths.ROOT).as_posix()
            if then is None:
                continue
            now = _hash_now(repo, path)
            if now is None:
                found.missing.append(path)
            elif now[0] != then:
                files = _changed_files(cached_listing(repo, then), now[1])
                found.differences.append(Difference(kind, path, then, now[0], files))
    then = found.facts.get("parameters.digest")
    if then and found.facts.get("artifact") in ("base", "adapter", "merged"):
        digest = lineage.parameters_digest(lineage.parameters(found.facts["artifact"]))
        if digest != then:
            found.differences.append(Difference("parameter", "one or more, upstream of the file", then, digest))


# What is printed


def _lines(found: Trace) -> Iterator[str]:
    facts = found.facts
    yield f"file        {found.path}: {found.bytes:,} bytes, md5 {found.md5}"
    yield f"type        {found.type}, {found.bits_per_weight:g} bits per weight"
    artifact = facts.get("artifact", "unknown")
    source = "the adapter alone" if artifact == "adapter" else f"{artifact} model"
    yield f"made from   {source}, by Lathe {facts.get('version', '(unknown version)')}"
    for name in ("adapter", "dataset", "base"):
        if any(key.startswith(f"{name}.") for key in facts):
            yield f"{name:<12}{_origin(facts, name)}"
    yield f"parameters  digest {facts.get('parameters.digest', 'unknown')}"
    yield f"template    {'sha256 ' + found.template_sha256 if found.template_sha256 else 'none'}"
    yield ""
    yield from _origin_lines(found)
    if found.broken:
        yield f"dvc.lock there is of several runs: {', '.join(found.broken)} was made again later"
    yield ""
    against = {None: "its metadata", "dvc.lock": "the workspace's dvc.lock"}.get(
        found.compared_with, f"commit {str(found.compared_with)[:10]}"
    )
    if found.differences:
        yield f"no longer matches in this workspace (compared with {against}):"
        for difference in found.differences:
            yield f"  {difference.kind:<12}{_change(difference)}"
    else:
        yield f"nothing in this workspace differs (compared with {against})"
    if found.missing:
        yield f"not here to compare (`dvc pull` brings it): {', '.join(found.missing)}"


def _origin(facts: Mapping[str, str], name: str) -> str:
    keys = {key: facts.get(f"{name}.{key}") for key in ("name", "source", "id", "revision", "commit", "digest")}
    parts = [keys["name"]] if keys["name"] else []
    if keys["source"]:
        parts.append(f"({keys['source']})")
    parts += [f"{key} {keys[key]}" for key in ("id", "revision", "commit", "digest") if keys[key]]
    return " ".join(part for part in parts if part)


def _origin_lines(found: Trace) -> Iterator[str]:
    if found.holds is None:
        yield "no dvc.lock that this repository knows holds the file, its adapter or its base"
        return
    if found.holds == "file":
        yield f"made by     stage {found.stage}, as {found.made_as}"
    else:
        yield f"no dvc.lock that this repository knows holds the file; its {found.holds} is in that of"
    if found.in_workspace:
        yield "in          the workspace's dvc.lock"
    for commit in (commit for commit in found.commits if commit.experiment):
        yield f"experiment  {commit.experiment} ({commit.commit[:10]}, {commit.date})"
    commits = [commit for commit in found.commits if not commit.experiment]
    if commits:
        yield f"commit      {commits[-1].commit[:10]} {commits[-1].subject} ({commits[-1].date})"
    if len(commits) > 1:
        yield f"            and {len(commits) - 1} later with another dvc.lock, the last {commits[0].commit[:10]}"


def _change(difference: Difference) -> str:
    if difference.kind in ("parameter", "preset"):
        return f"{difference.name}: {_shown(difference.then)} -> {_shown(difference.now)}"
    if difference.now is None:
        return f"{difference.name}: gone"
    shown = ", ".join(difference.files[:_NAMES_SHOWN])
    more = f" and {len(difference.files) - _NAMES_SHOWN} more" if len(difference.files) > _NAMES_SHOWN else ""
    if difference.kind == "file":
        return f"{difference.name}: another file lies there"
    return f"{difference.name}: changed{f' ({shown}{more})' if shown else ''}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
