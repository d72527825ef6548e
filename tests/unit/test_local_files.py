"""Local data and models that neither DVC nor Git keeps are named: nothing can bring them back."""

import json
import logging
import subprocess
from pathlib import Path

import pytest

from lathe import stage
from lathe.common import paths
from lathe.config.adapter_base import resolve_adapter
from lathe.config.load import Config, load
from lathe.config.local_paths import list_local_files, list_local_paths
from lathe.config.presets import LocalDataset, LocalModel
from lathe.doctor.doctor import check_local_files
from lathe.provenance.local_files import find_untracked

FILES = (
    "data/local/rows.jsonl",
    "data/local/splits/train.jsonl",
    "data/local/splits/test.jsonl",
    "models/local/mine/a",
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with local files, in place of this one."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def configured(data: str, model: str = "models/local/mine") -> Config:
    changes = {
        "dataset": LocalDataset(source="local", path=data),
        "model": LocalModel(source="local", path=model),
    }
    return load(paths.PARAMS).model_copy(update=changes)


def test_what_nothing_tracks_is_found(root):
    assert find_untracked(configured("data/local/rows.jsonl")) == ["models/local/mine", "data/local/rows.jsonl"]
    assert find_untracked(configured("data/local/none.jsonl", "models/local/none")) == []
    assert find_untracked(load(paths.PARAMS)) == []  # from a package, and built in


@pytest.mark.parametrize(
    ("data", "tracked", "found"),
    [
        ("data/local/rows.jsonl", ["data/local/rows.jsonl.dvc"], False),
        ("data/local/splits", ["data/local/splits.dvc"], False),
        ("data/local/splits", ["data/local/splits/train.jsonl.dvc"], True),
        ("data/local/splits", ["data/local/splits/train.jsonl.dvc", "data/local/splits/test.jsonl.dvc"], False),
        ("data/local/splits/test.jsonl", ["data/local/splits.dvc"], False),
    ],
)
def test_what_dvc_add_has_written_counts_alone_and_with_its_folder(root, data, tracked, found):
    for name in [*tracked, "models/local/mine.dvc"]:
        (root / name).write_text("outs: []\n")
    assert find_untracked(configured(data)) == ([data] if found else [])


def test_what_git_keeps_is_kept(root):
    subprocess.run(["git", "add", "data/local/rows.jsonl", "models"], cwd=root, check=True)
    assert find_untracked(configured("data/local/rows.jsonl")) == []


def test_an_adapter_in_place_of_a_model_is_listed_and_kept_with_its_base(root, monkeypatch):
    monkeypatch.setattr(paths, "MODELS_LOCAL", root / "models/local")
    adapter = root / "models/local/adapter/adapter_config.json"
    adapter.parent.mkdir()
    adapter.write_text(json.dumps({"base_model_name_or_path": "models/local/mine"}))
    given = LocalModel(source="local", path="models/local/adapter")
    config = configured("data/local/rows.jsonl").model_copy(update={"model": resolve_adapter(given)})
    assert list_local_paths(config, "model") == ["models/local/mine", "models/local/adapter"]
    assert find_untracked(config, {"model": config.model}) == ["models/local/mine", "models/local/adapter"]
    listed = {file["path"]: file["sha256"] for file in list_local_files(config, "model")["files"]}
    assert set(listed) == {"models/local/mine/a", "models/local/adapter/adapter_config.json"}
    (root / "models/local/mine/a").write_text("another base")
    changed = {file["path"]: file["sha256"] for file in list_local_files(config, "model")["files"]}
    assert {path for path in listed if listed[path] != changed[path]} == {"models/local/mine/a"}


def test_fetch_and_doctor_say_how_to_keep_it(root, caplog):
    config = configured("data/local/rows.jsonl")
    with caplog.at_level(logging.WARNING):
        stage.warn_of_untracked(config, ["dataset"])
    [record] = caplog.records
    assert record.getMessage().startswith("data/local/rows.jsonl: in no cache: it cannot be restored")
    assert record.getMessage().endswith("`dvc add data/local/rows.jsonl`")
    findings = list(check_local_files(config))
    assert {(finding.status, finding.remedy) for finding in findings} == {
        ("warning", "`dvc add models/local/mine`"),
        ("warning", "`dvc add data/local/rows.jsonl`"),
    }
