"""DVC's files are read and written by libyaml as DVC does itself."""

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from lathe.common import dvc_yaml, paths


class Stream(io.StringIO):
    name = "/somewhere/dvc.lock"


def written(write: Any, data: Any) -> str:
    stream = Stream()
    write(data, stream)
    return stream.getvalue()


@pytest.mark.parametrize("folder", [paths.ROOT, paths.CLASSIFIER], ids=["main", "classify"])
def test_a_lock_is_written_byte_for_byte_as_by_dvc(folder: Path) -> None:
    text = (folder / "dvc.lock").read_text(encoding="utf-8")
    stages: dict[str, Any] = {
        "schema": "2.0",
        "stages": OrderedDict(a=OrderedDict(cmd="x", params={"rate": 5e-05, "none": None})),
    }
    for data, with_comments in (
        (dvc_yaml.read(text, "dvc.lock"), dvc_yaml.read_with_comments(text, "dvc.lock")),
        (stages, stages),
    ):
        assert written(dvc_yaml.write, data) == written(dvc_yaml.write_with_comments, with_comments)
    assert written(dvc_yaml.write, dvc_yaml.read(text, "dvc.lock")) == text


def test_a_file_with_comments_keeps_them() -> None:
    text = "# of the user\nstages: {}\n"
    stream = io.StringIO()
    dvc_yaml.write(dvc_yaml.read(text, "dvc.yaml"), stream)
    assert stream.getvalue() == text


@pytest.mark.parametrize("name", ["dvc.lock", "params.yaml", "presets.yaml", "classify/dvc.lock"])
def test_a_text_that_was_read_before_says_the_same_and_is_not_shared(name: str) -> None:
    text = (paths.ROOT / name).read_text(encoding="utf-8")
    texts = dvc_yaml.Texts()
    first = texts.parse(text, name)
    assert first == texts.parse(text, name) == dvc_yaml.parse(text, name)
    first.clear()
    assert texts.parse(text, name) == dvc_yaml.parse(text, name)


def test_what_a_lock_says_after_it_was_written_is_what_its_text_says() -> None:
    data = dvc_yaml.parse((paths.ROOT / "dvc.lock").read_text(encoding="utf-8"), "dvc.lock")
    del data["stages"][next(iter(data["stages"]))]
    data["stages"]["new"] = OrderedDict(cmd="exec", params={"a.b": [1, 2.5e-07, None, True, "on", "1e5", "x " * 60]})
    texts = dvc_yaml.Texts()
    text = texts.dump_lock(data)
    assert texts.parse(text, "dvc.lock") == dvc_yaml.parse(text, "dvc.lock") == dvc_yaml.copy_plain(data)
    data["stages"]["new"]["cmd"] = "exec other"
    assert texts.dump_lock(data) == text.replace("cmd: exec\n", "cmd: exec other\n")
    assert texts.dump_lock({"schema": "2.0", "stages": {}}) == "schema: '2.0'\nstages: {}\n"
