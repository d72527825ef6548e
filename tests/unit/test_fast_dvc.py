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
    stages = {"schema": "2.0", "stages": OrderedDict(a=OrderedDict(cmd="x", params={"rate": 5e-05, "none": None}))}
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
