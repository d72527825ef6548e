"""The `dvc` of the tests' checkouts writes dvc.lock as DVC does."""

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import fast_dvc
import pytest

from lathe.common import paths


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
        (fast_dvc.read(text, "dvc.lock"), fast_dvc.read_with_comments(text, "dvc.lock")),
        (stages, stages),
    ):
        assert written(fast_dvc.write, data) == written(fast_dvc.write_with_comments, with_comments)
    assert written(fast_dvc.write, fast_dvc.read(text, "dvc.lock")) == text


def test_a_file_with_comments_keeps_them() -> None:
    text = "# of the user\nstages: {}\n"
    stream = io.StringIO()
    fast_dvc.write(fast_dvc.read(text, "dvc.yaml"), stream)
    assert stream.getvalue() == text


@pytest.mark.parametrize("name", ["dvc.lock", "params.yaml", "presets.yaml", "classify/dvc.lock"])
def test_a_text_that_was_read_before_says_the_same_and_is_not_shared(name: str) -> None:
    text = (paths.ROOT / name).read_text(encoding="utf-8")
    texts = fast_dvc.Texts()
    first = texts.parse(text, name)
    assert first == texts.parse(text, name) == fast_dvc.parse(text, name)
    first.clear()
    assert texts.parse(text, name) == fast_dvc.parse(text, name)


def test_what_a_lock_says_after_it_was_written_is_what_its_text_says() -> None:
    data = fast_dvc.parse((paths.ROOT / "dvc.lock").read_text(encoding="utf-8"), "dvc.lock")
    del data["stages"][next(iter(data["stages"]))]
    data["stages"]["new"] = OrderedDict(cmd="exec", params={"a.b": [1, 2.5e-07, None, True, "on", "1e5", "x " * 60]})
    texts = fast_dvc.Texts()
    text = texts.dump_lock(data)
    assert texts.parse(text, "dvc.lock") == fast_dvc.parse(text, "dvc.lock") == fast_dvc.copy_plain(data)
    data["stages"]["new"]["cmd"] = "exec other"
    assert texts.dump_lock(data) == text.replace("cmd: exec\n", "cmd: exec other\n")
    assert texts.dump_lock({"schema": "2.0", "stages": {}}) == "schema: '2.0'\nstages: {}\n"
