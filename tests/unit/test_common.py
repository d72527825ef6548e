"""What every package shares: Git, dotted keys, JSON files, sizes and progress, each in one module."""

import ast
import json
import logging
import os
import re
import subprocess
import sys

import pytest
from refusals import refused

from lathe.common import dotted_keys, git, json_files, paths, progress
from lathe.common.progress import Progress
from lathe.common.scratch import temporary_folder

MODULES = [*(paths.ROOT / "src").rglob("*.py"), *(paths.ROOT / "stages").glob("*.py")]


# What DVC is made of; `dvclive` is documented, and is not among them.
OF_DVC = {"dvc", "dvc_data", "dvc_objects", "dvc_s3", "scmrepo", "hydra", "voluptuous"}


def nodes(*but):
    """Yield every node of every module but some, with its place."""
    for file in MODULES:
        if file.name not in but:
            for node in ast.walk(ast.parse(file.read_text())):
                yield node, f"{file.relative_to(paths.ROOT)}:{getattr(node, 'lineno', 0)}"


def test_two_modules_alone_import_the_packages_of_dvc():
    for node, place in nodes("dvc_api.py", "dvc_yaml.py"):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & OF_DVC, place


def test_one_module_alone_runs_git():
    for node, place in nodes("git.py"):
        if isinstance(node, ast.List | ast.Tuple) and node.elts and isinstance(node.elts[0], ast.Constant):
            # The studio starts what a user types.
            assert node.elts[0].value != "git" or "/studio/started_commands.py" in place, place


@pytest.fixture
def repository(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return tmp_path


def commit(root):
    subprocess.run(["git", "add", "--all"], cwd=root, check=True)
    identity = ("-c", "user.name=A User", "-c", "user.email=user@example.invalid")
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "one"], cwd=root, check=True)


def test_git_returns_what_it_prints_or_none_where_it_may_fail(repository):
    assert git.find_head() is None
    (repository / "a \u00fc.txt").write_text("a")
    assert git.list_paths("ls-files", "--others") == ["a \u00fc.txt"]
    commit(repository)
    assert git.find_head() == git.run_git("rev-parse", "HEAD").decode().strip()
    assert git.try_git("show", "HEAD:none") is None
    assert git.read_line("config", "no.such") is None
    assert git.run_git("cat-file", "--batch-check", stdin="HEAD\n").split()[1] == b"commit"


def test_a_failure_of_git_is_one_line_with_a_remedy(repository, tmp_path_factory, monkeypatch):
    with refused("git-failed", "git show: ", "see `git status`", kept=False):
        git.run_git("show", "HEAD:none")
    with refused("git-failed", "run this in a clone of the repository", kept=False):
        git.run_git("status", root=tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv("PATH", "")
    for call in (git.run_git, git.try_git):
        with refused("git-missing", "git is not installed; install it"):
            call("status")


TREE = {"seed": 1, "lora": {"r": 8, "target_modules": ["q"], "none": {}}, "gates": {"a.b > 0": True}}


def test_dotted_keys_are_walked_flattened_read_and_compared():
    assert list(dotted_keys.walk(TREE)) == [
        (("seed",), 1),
        (("lora", "r"), 8),
        (("lora", "target_modules"), ["q"]),
        (("lora", "none"), {}),
        (("gates", "a.b > 0"), True),
    ]
    assert dotted_keys.flatten(TREE["lora"], "lora.") == {"lora.r": 8, "lora.target_modules": ["q"], "lora.none": {}}
    assert dotted_keys.get_value(TREE, "lora.r") == 8
    assert dotted_keys.get_value(TREE, "lora.r.x") is dotted_keys.get_value(TREE, "none") is None
    assert dotted_keys.compare({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {"a": (1, None), "b": (2, 3), "c": (None, 4)}


def test_json_is_written_completely_and_read_back(tmp_path):
    file = tmp_path / "deep/a.json"
    json_files.write_json(file, {"b": 0.1, "a": "\u00fc"})
    assert file.read_text() == '{\n  "b": 0.1,\n  "a": "\u00fc"\n}\n'
    assert json_files.read_json(file) == json_files.read_json_object(file) == {"b": 0.1, "a": "\u00fc"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_files.write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"b": 0.1, "a": "\u00fc"}
    assert [child.name for child in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (None, "no-such-file", "a.json: no such file; mend it"),
        (b'{"a": 1,\n', "not-json", "a.json:2: not valid JSON: "),
        (b"\xff", "not-utf8", "a.json: byte 0 is not UTF-8; mend it"),
        (b"[]", "no-json-object", "a.json: must hold a JSON object; mend it"),
    ],
)
def test_a_damaged_json_file_is_refused_by_file_and_line(tmp_path, content, code, part):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with refused(code, part):
        json_files.read_json_object(file, shown="a.json", remedy="mend it")


def test_no_time_is_named_before_a_twentieth_of_the_work_is_done(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="lathe.common.progress")
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with Progress("answers", 100) as answers:
        answers.add(1)
        answers.add(4)
        answers.add(1)
    assert [message.rpartition(", ")[2] for message in caplog.messages[:2]] == ["? s left", "? s left"]
    assert re.fullmatch(r"answers: 6 of 100 rows, \d+ s left", caplog.messages[2])


def test_progress_is_logged_now_and_then_and_at_both_ends_if_wanted(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="lathe.common.progress")
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with Progress("rows", 10) as quiet:
        quiet.add(2)
    assert not caplog.messages
    with Progress("copy", 4000, done=1000, unit="B", log_ends=True) as copied:
        copied.add(1500)
        copied.add(-500)
        copied.add(2000)
    assert caplog.messages[0] == "copy: 1 kB of 4 kB, ? s left"
    assert caplog.messages[-1] == "copy: 4 kB of 4 kB, 0 s left"
    assert not copied.is_drawn
    caplog.clear()
    with Progress("reading", unit="row", log_ends=True) as counted:
        counted.add(1234)
    assert caplog.messages[-1] == "reading: 1,234 rows"
    caplog.clear()
    with Progress("training", 4, unit="step", log=False, log_ends=True) as silent:
        silent.add(4)
    assert not caplog.messages


def test_a_temporary_folder_of_a_killed_process_goes_with_the_next_and_one_in_use_stays(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from lathe.common.scratch import temporary_folder
with temporary_folder(Path(sys.argv[1]), "copy") as folder:
    (folder / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "src")}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    [left] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (left / "file").exists()
    (tmp_path / ".other.folder.lock.partial").touch()
    with temporary_folder(tmp_path, "copy") as first:
        assert not left.exists()
        with temporary_folder(tmp_path, "copy") as second:
            assert first.is_dir()
            assert first != second
            assert list(second.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == [".other.folder.lock.partial"]
