"""A GGUF that left its folder and name is traced to what made it, and every change since is named."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Checkout, copy_of
from dvc.repo import Repo

from lathe.common import paths
from lathe.gguf.description import describe_gguf
from lathe.provenance import lineage, trace, verify


@pytest.fixture(scope="module")
def made(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose pipeline has run once; each test leaves it as it was."""
    return copy_of(reproduced, tmp_path_factory.mktemp("lineage") / "lathe")


@pytest.fixture(scope="module")
def elsewhere(made: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized file, copied out of the checkout under another name."""
    file = tmp_path_factory.mktemp("elsewhere") / "renamed by a user.bin"
    shutil.copyfile(made.root / "models/gguf/Q4_K_M.gguf", file)
    return file


def locked(made: Checkout) -> dict[str, Any]:
    return yaml.safe_load((made.root / "dvc.lock").read_text())["stages"]


def out_hash(made: Checkout, path: str) -> str:
    [found] = [out["md5"] for stage in locked(made).values() for out in stage["outs"] if out["path"] == path]
    return found


def lathe(made: Checkout, *arguments: str, check: bool = True):
    return made.run("python", "-m", "lathe", *arguments, check=check, env={"PYTHONPATH": str(made.root / "src")})


@contextmanager
def within(made: Checkout) -> Iterator[None]:
    """Let this process work in another checkout, which takes a tenth of the time that one of its own takes."""
    with pytest.MonkeyPatch.context() as patch:
        root = paths.ROOT
        for name, path in vars(paths).copy().items():
            if isinstance(path, Path) and path.is_relative_to(root):
                patch.setattr(paths, name, made.root / path.relative_to(root))
        yield


def traced(made: Checkout, file: Path) -> trace.Trace:
    with within(made):
        return trace.trace(file)


def differences(made: Checkout, file: Path) -> list[tuple[str, str]]:
    return [(found.kind, found.name) for found in traced(made, file).differences]


class Edited:
    """A file with other contents for the length of a block: what the user does, and undoes."""

    def __init__(self, file: Path, edit: Any) -> None:
        self.file, self.before = file, file.read_bytes()
        self.after = edit(self.before)
        assert self.after != self.before

    def __enter__(self) -> None:
        self._write(self.after)

    def __exit__(self, *_: object) -> None:
        self._write(self.before)

    def _write(self, content: bytes) -> None:
        self.file.unlink()  # it may be a link into DVC's cache
        self.file.write_bytes(content)


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


# What the file says itself


def test_each_gguf_carries_the_digests_of_all_that_it_was_made_from(made):
    names = ("base-f16", "adapter/adapter-f16", "merged-f16", "Q8_0", "Q4_K_M")
    base, adapter, *merged = (describe_gguf(made.root / f"models/gguf/{name}.gguf")["metadata"] for name in names)
    lock = locked(made)
    for metadata, item in [(base, "base"), (adapter, "adapter"), *((metadata, "merged") for metadata in merged)]:
        assert metadata["lathe.artifact"] == item
        assert metadata["lathe.base.name"] == "small"
        assert metadata["lathe.base.digest"] == out_hash(made, "models/base")
        assert metadata["lathe.parameters.digest"] == lineage.digest_parameters(lock[f"convert_{item}"]["params"])
    for metadata in (adapter, *merged):
        assert metadata["lathe.dataset.name"] == "few"
        assert metadata["lathe.dataset.digest"] == out_hash(made, "data/processed")
        assert metadata["lathe.adapter.digest"] == out_hash(made, "models/adapter")
    assert not [key for key in base if key.startswith(("lathe.dataset", "lathe.adapter"))]


@pytest.mark.parametrize("item", ["base", "adapter", "merged"])
def test_the_digest_covers_the_parameters_of_every_stage_before_and_no_others(item):
    with Repo(str(paths.ROOT)) as repo:
        by_name = {stage.name: stage for stage in repo.index.stages if stage.cmd}
        # DVC's arrows point to what is needed. Of the data, base-f16 has nothing: its token ids are checked on them.
        last = by_name["fetch@model" if item == "base" else f"convert_{item}"]
        before, waiting = {last}, [last]
        while waiting:
            found = set(repo.index.graph.successors(waiting.pop())) - before
            before |= found
            waiting += found
        # Which presets are selected: their entries, which bear their names, are covered.
        before = {stage for stage in before if not stage.name.startswith("local_files")}
        own = tracked(by_name[f"convert_{item}"])
        needed = set().union(*(tracked(stage) for stage in before if stage.cmd)) | {("params.yaml", "convert")}
        # The conversion itself sets the options of the template.
        needed |= {("params.yaml", "preprocess.chat_template_kwargs")}
    covered = {(file, key) for file, values in lineage.select_parameters(item).items() for key in values}
    assert covered == own
    for file, key in needed:
        parts = key.split(".")
        assert any((file, ".".join(parts[:count])) in covered for count in range(1, len(parts) + 1)), key
    for file, key in covered:
        assert any(file == one and (other == key or other.startswith(f"{key}.")) for one, other in needed), key


def tracked(stage: Any) -> set[tuple[str, str]]:
    return {(dep.def_path, name) for dep in stage.params for name in dep.params}


# Where it comes from


def test_a_renamed_copy_names_its_dataset_base_and_commit(made, elsewhere):
    said = lathe(made, "trace", str(elsewhere)).stdout
    head = made.run("git", "rev-parse", "HEAD").stdout.strip()
    assert f"dataset     few (local) digest {out_hash(made, 'data/processed')}" in said
    assert f"base        small (local) digest {out_hash(made, 'models/base')}" in said
    assert f"commit      {head[:10]} a state to start from" in said
    assert "made by     stage quantize@Q4_K_M, as models/gguf/Q4_K_M.gguf" in said
    assert "type        Q4_K_M" in said
    assert "nothing in this workspace differs" in said
    found = json.loads(lathe(made, "trace", str(elsewhere), "--json").stdout)
    assert [commit["commit"] for commit in found["commits"]] == [head]
    assert found["facts"]["dataset.digest"] == out_hash(made, "data/processed")
    found = traced(made, elsewhere)
    assert (found.differences, found.missing, found.broken) == ([], [], [])


@pytest.mark.parametrize(
    ("file", "kind", "name", "inside"),
    [
        ("data/local/few.jsonl", "data", "data/local", []),
        ("data/processed/test.jsonl", "data", "data/processed", ["test.jsonl"]),
        ("models/adapter/adapter_model.safetensors", "model", "models/adapter", ["adapter_model.safetensors"]),
        ("src/lathe/models/merge/merge.py", "code", "src/lathe/models/merge/", ["src/lathe/models/merge/merge.py"]),
        ("src/lathe/training/sft.py", "code", "src/lathe/training/sft.py", []),
        ("models/gguf/Q4_K_M.gguf", "file", "models/gguf/Q4_K_M.gguf", []),
    ],
)
def test_one_changed_byte_is_named(made, elsewhere, file, kind, name, inside):
    def edit(content: bytes) -> bytes:
        return content + b"# edited\n" if kind == "code" else flipped(content)

    with Edited(made.root / file, edit):
        found = traced(made, elsewhere)
    changes = {(one.kind, one.name.rstrip("/")): one.files for one in found.differences}
    assert changes.keys() == {(kind, name.rstrip("/"))}
    assert changes[kind, name.rstrip("/")] == inside
    assert differences(made, elsewhere) == []


def test_other_local_files_are_no_change(made, elsewhere):
    others = [made.root / name for name in ("data/local/other.jsonl", "models/local/other/config.json")]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("{}\n")
    try:
        assert differences(made, elsewhere) == []
        with Edited(made.root / "data/local/few.jsonl", flipped):
            assert differences(made, elsewhere) == [("data", "data/local")]
        with Edited(made.root / "models/local/small/config.json", lambda content: content + b"\n"):
            assert differences(made, elsewhere) == [("model", "models/local")]
    finally:
        for other in others:
            other.unlink()
        others[1].parent.rmdir()


def test_an_edited_parameter_is_named_with_both_values(made, elsewhere):
    def edit(content: bytes) -> bytes:
        return (
            content.replace(b"r: 16 #", b"r: 8 #")
            .replace(b"seed: 42", b"seed: 43")
            .replace(b"n_ctx: 256", b"n_ctx: 99")
        )

    with Edited(made.root / "params.yaml", edit):
        said = lathe(made, "trace", str(elsewhere)).stdout
    assert re.findall(r"^  parameter +(.*)$", said, re.MULTILINE) == ["lora.r: 16 -> 8", "seed: 42 -> 43"]


def test_another_preset_and_an_edited_one_are_told_apart(made, elsewhere):
    with Edited(made.root / "params.yaml", lambda text: text.replace(b"model: small", b"model: tiny")):
        assert ("preset", "model") in differences(made, elsewhere)
    with Edited(made.root / "presets.yaml", lambda text: text.replace(b"completion: reply", b"completion: other")):
        assert differences(made, elsewhere) == [("preset", "datasets.few.completion")]
    with Edited(made.root / "presets.yaml", lambda text: text + b"# a remark\n"):
        assert differences(made, elsewhere) == []


def test_two_runs_are_told_apart_though_their_weights_are_the_same(made, elsewhere, tmp_path):
    made.run(
        *("dvc", "exp", "run", "--temp", "--name", "other", "-S", "merge.max_shard_size_bytes=4000000000"),
        "quantize@Q4_K_M",
    )
    ref = made.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/other").stdout.strip()
    lock = yaml.safe_load(made.run("git", "show", f"{ref}:dvc.lock").stdout)["stages"]
    [md5] = [out["md5"] for out in lock["quantize@Q4_K_M"]["outs"] if out["path"].endswith(".gguf")]
    theirs_f16, own_f16 = (
        next(out["md5"] for out in stages["convert_merged"]["outs"] if out["path"].endswith(".gguf"))
        for stages in (lock, locked(made))
    )
    theirs = tmp_path / "theirs.gguf"
    shutil.copyfile(made.root / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}", theirs)
    adapters = [describe_gguf(file)["metadata"]["lathe.adapter.digest"] for file in (elsewhere, theirs)]
    assert adapters[0] == adapters[1]

    one, other = traced(made, elsewhere), traced(made, theirs)
    assert [commit.experiment for commit in one.commits] == [None]
    assert [commit.experiment for commit in other.commits] == ["other"]
    assert one.in_workspace
    assert not other.in_workspace
    assert one.differences == []
    assert {(found.kind, found.name): (found.then, found.now) for found in other.differences} == {
        ("parameter", "merge.max_shard_size_bytes"): (4000000000, 5000000000),
        ("model", "models/gguf/merged-f16.gguf"): (theirs_f16, own_f16),
        ("file", "models/gguf/Q4_K_M.gguf"): (md5, one.md5),
    }
    assert "experiment  other (" in lathe(made, "trace", str(theirs)).stdout


def test_in_another_repository_the_metadata_alone_is_compared(elsewhere, small_checkout):
    found = traced(small_checkout, elsewhere)
    assert found.holds is None
    assert found.commits == []
    assert found.facts["dataset.name"] == "few"
    assert found.missing == ["models/base", "data/processed", "models/adapter"]
    assert found.differences == []  # its parameters are the same
    small_checkout.set({"lora.r": 4})
    assert differences(small_checkout, elsewhere) == [("parameter", "one or more, upstream of the file")]


def test_what_is_no_gguf_is_refused_in_one_line(made, tmp_path):
    done = lathe(made, "trace", str(tmp_path / "none.gguf"), check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*none\.gguf: no such file; name a GGUF file\n", done.stderr)


# Whether all is as recorded


def verified(made: Checkout) -> list[str]:
    with within(made):
        return [str(difference) for difference in verify.verify()[0]]


def test_a_reproduced_workspace_verifies_and_one_that_is_not_ends_with_code_1(made):
    lines = lathe(made, "verify").stdout.splitlines()
    assert re.fullmatch(r"\d+ outputs, [\d,]+ bytes read: nothing differs from dvc\.lock", lines[0])
    assert "dvc status" in lines[1]
    with Edited(made.root / "models/gguf/Modelfile", flipped):
        done = lathe(made, "verify", check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("models/gguf/Modelfile: changed (")


def test_a_changed_byte_is_found_in_the_file_it_is_in_whatever_its_time_stamp(made):
    file = made.root / "data/processed/test.jsonl"
    stamp = file.stat()
    edited = Edited(file, flipped)
    with edited:
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        lines = verified(made)
    assert len(lines) == 1
    assert lines[0].startswith("data/processed/test.jsonl: changed (")
    assert "`dvc checkout --force data/processed/test.jsonl` puts it back" in lines[0]


def test_a_missing_and_an_extra_file_are_found(made):
    gguf_file, extra = made.root / "models/gguf/Q8_0.gguf", made.root / "models/adapter/notes.txt"
    content = gguf_file.read_bytes()
    gguf_file.unlink()
    extra.write_text("mine")
    try:
        lines = verified(made)
    finally:
        gguf_file.write_bytes(content)
        extra.unlink()
    assert sorted(lines) == [
        "models/adapter/notes.txt: not in dvc.lock; remove it",
        "models/gguf/Q8_0.gguf: missing; `dvc checkout models/gguf/Q8_0.gguf` puts it back",
    ]


@pytest.mark.parametrize("linked", [True, False])
def test_damage_done_in_place_to_dvc_s_own_copy_is_found(made, linked):
    md5 = out_hash(made, "models/gguf/Q8_0.gguf")
    file, cached = made.root / "models/gguf/Q8_0.gguf", made.root / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}"
    content = cached.read_bytes()
    cached.unlink()  # it may be linked to that of another checkout
    cached.write_bytes(content)
    file.unlink()
    (os.link if linked else shutil.copyfile)(cached, file)
    cached.write_bytes(flipped(content))
    try:
        lines = verified(made)
    finally:
        cached.write_bytes(content)
    place = f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}"
    assert len(lines) == 1
    if linked:
        assert lines[0].startswith("models/gguf/Q8_0.gguf: changed (")
        assert "in DVC's cache too; " in lines[0]
    else:
        assert lines[0].startswith(f"{place}: damaged, DVC's copy of models/gguf/Q8_0.gguf; ")
    assert f"remove {place}, then `dvc pull`, or `dvc repro`" in lines[0]


# The card


def test_the_card_and_the_modelfile_are_for_the_best_file(made):
    folder = made.root / "models/gguf"
    report = made.json("metrics/evaluate/validation.json")
    metric = yaml.safe_load((made.root / "params.yaml").read_text())["evaluate"]["primary_metric"]
    best = max(("Q8_0", "Q4_K_M"), key=lambda name: (report[name][metric], -report[name]["bytes"]))
    assert f"FROM ./{best}.gguf\n" in (folder / "Modelfile").read_text()
    card = (folder / "README.md").read_text()
    assert f"**{best}.gguf** has the best {metric}" in card
    assert out_hash(made, "models/adapter") in card
    assert f"PARAMETER num_ctx {SMALL['generate.n_ctx']}\n" in (folder / "Modelfile").read_text()
