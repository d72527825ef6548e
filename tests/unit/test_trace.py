"""A GGUF is traced through every dvc.lock that Git knows, and refused in one line where it is none of Lathe's."""

import subprocess
from pathlib import Path

import pytest
from refusals import refused
from shared import processor_seconds

from lathe.common import paths
from lathe.gguf.description import describe_gguf
from lathe.provenance import lineage, trace

COMMIT = "6b2f" * 10


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Git repository in place of this one."""
    root = tmp_path / "repository"
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(root)], check=True)
    monkeypatch.setattr(paths, "ROOT", root)
    return root


def written(file: Path, metadata: dict[str, str]) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    for key, value in metadata.items():
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def commits(root: Path, count: int) -> None:
    """Make commits whose dvc.lock holds the md5 of their number, in one stream."""
    lines = []
    for number in range(count):
        lock = f"stages:\n  one:\n    outs:\n    - path: a\n      md5: {number:032d}\n" + "# filling\n" * 3000
        lines.append(
            f"commit refs/heads/main\ncommitter A User <user@example.invalid> {10**9 + number} +0000\n"
            f"data {len(str(number))}\n{number}\nM 644 inline dvc.lock\ndata {len(lock)}\n{lock}\n"
        )
    subprocess.run(["git", "fast-import", "--quiet"], cwd=root, input="".join(lines).encode(), check=True)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "no-such-file"),
        (b"", "not-gguf"),
        (b"GGUF", "damaged-gguf"),
        (b"GGUF" + b"\xff" * 64, "damaged-gguf"),
        (b"PK\x03\x04 a zip", "not-gguf"),
    ],
)
def test_a_missing_or_damaged_file_is_refused_in_one_line(tmp_path, content, code):
    file = tmp_path / "a.gguf"
    if content is not None:
        file.write_bytes(content)
    with refused(code, f"{file}: ") as caught:
        trace.trace(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_refused(tmp_path):
    import numpy as np
    from gguf import GGUFWriter

    file = tmp_path / "a.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_tensor("weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert describe_gguf(file)["parameters"] == 4096
    file.write_bytes(file.read_bytes()[:-8192])
    with refused("truncated-gguf", f"{file}: cut short"):
        trace.trace(file)


def test_a_gguf_of_someone_else_is_said_to_be_none_of_lathe(tmp_path):
    file = written(tmp_path / "a.gguf", {"general.name": "a stranger"})
    with refused("no-lineage", f"{file}: not made by Lathe"):
        trace.trace(file)


def test_the_commit_is_found_among_five_hundred_in_seconds(repository):
    commits(repository, 500)
    started = processor_seconds()
    [(commit, held)] = trace._find_locks([f"{123:032d}"]).items()
    assert processor_seconds() - started < 5
    assert held == {f"{123:032d}"}
    assert [found.subject for found in trace._describe_commits([commit])] == ["123"]


def test_commits_come_newest_first_and_experiments_by_name_but_not_what_dvc_keeps_for_itself(repository):
    commits(repository, 3)
    ids = subprocess.run(["git", "rev-list", "main"], cwd=repository, capture_output=True, text=True).stdout.split()
    baseline = f"refs/exps/{ids[0][:2]}/{ids[0][2:]}"
    lock = subprocess.run(["git", "show", "main~1:dvc.lock"], cwd=repository, capture_output=True, text=True).stdout
    for ref, number in ((f"{baseline}/mine", 7), ("refs/exps/celery/stash", 8), ("refs/exps/exec/EXEC_HEAD", 9)):
        read, made = (
            f"    {kind}:\n    - path: b\n      md5: {md5:032d}\n" for kind, md5 in (("deps", 1), ("outs", 2))
        )
        text = lock.replace(f"{1:032d}", f"{number:032d}") + f"  two:\n{read}{made}"
        stream = (
            f"commit {ref}\ncommitter A User <user@example.invalid> {2 * 10**9} +0000\ndata 3\nexp\n"
            f"from refs/heads/main^0\nM 644 inline dvc.lock\ndata {len(text)}\n{text}\n"
        )
        subprocess.run(["git", "fast-import", "--quiet"], cwd=repository, input=stream.encode(), check=True)
    found = trace._describe_commits(list(trace._find_locks([f"{2:032d}"])))
    assert [(commit.subject, commit.experiment) for commit in found] == [("exp", "mine"), ("2", None)]
    assert trace._find_locks([f"{8:032d}"]) == trace._find_locks([f"{9:032d}"]) == {}
    # What an experiment reads and did not make is not its own.
    assert [commit.subject for commit in trace._describe_commits(list(trace._find_locks([f"{1:032d}"])))] == ["1"]


def test_without_a_repository_the_metadata_alone_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    file = written(
        tmp_path / "a.gguf",
        {
            "lathe.version": "0.1.0",
            "lathe.base.id": "Qwen/Qwen3-0.6B",
            "lathe.base.revision": "main",
            "lathe.base.commit": COMMIT,
            "lathe.dataset.digest": "0123.dir",
        },
    )
    monkeypatch.setattr(trace, "_compare_with_metadata", lambda found: None)
    trace.run(file, as_json=False)
    said = capsys.readouterr().out
    assert f"base        id Qwen/Qwen3-0.6B revision main commit {COMMIT}" in said
    assert "dataset     digest 0123.dir" in said
    assert "no dvc.lock that this repository knows holds the file" in said


def test_what_was_read_and_is_by_now_of_another_run_is_told_from_what_still_fits():
    stages = {
        "old@fetch": {"outs": [{"path": "data/raw", "md5": "a.dir"}]},
        "fetch": {"outs": [{"path": "data/raw", "md5": "b.dir"}]},
        "train": {
            "deps": [{"path": "data/raw/train.jsonl", "md5": "c"}, {"path": "src/train.py", "md5": "d"}],
            "outs": [{"path": "models/adapter", "md5": "e.dir"}],
        },
        "merge": {
            "deps": [{"path": "models/adapter", "md5": "f.dir"}, {"path": "data/raw", "md5": "b.dir"}],
            "outs": [{"path": "models/merged", "md5": "g.dir"}],
        },
    }
    order, broken = trace._find_upstream(stages, "merge")
    assert order[0] == "merge"
    assert set(order) == {"merge", "train", "fetch", "old@fetch"}
    assert broken == ["models/adapter"]


def test_the_digest_of_parameters_knows_no_order_but_every_value():
    one = {"params.yaml": {"seed": 1, "lora": {"r": 16, "bias": None}}, "presets.yaml": {}}
    same = {"presets.yaml": {}, "params.yaml": {"lora": {"bias": None, "r": 16}, "seed": 1}}
    other = {"params.yaml": {"seed": 1, "lora": {"r": 16, "bias": False}}, "presets.yaml": {}}
    assert lineage.digest_parameters(one) == lineage.digest_parameters(same) != lineage.digest_parameters(other)
