"""What Lathe uses of DVC's packages behaves as expected, on a small repository that has run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import refused
from ruamel.yaml import YAML

from lathe.common import dvc_api
from lathe.common.dvc_api import DvcRepository, OverrideError, open_repository
from lathe.provenance.lineage import hash_folder, hash_path

DVC_YAML = """\
stages:
  make:
    matrix:
      letter: [a, b]
    cmd: python -c "open('${item.letter}.txt', 'w').write('${item.letter}')"
    deps: [data/rows.txt, folder/]
    params: [number]
    outs:
      - ${item.letter}.txt:
          push: false
  pack:
    cmd: python -c "import shutil; shutil.copytree('folder', 'packed')"
    deps: [folder]
    outs: [packed]
"""
CONFIG = """\
[core]
    remote = store
    autostage = true
[cache]
    type = copy
['remote "store"']
    url = {url}
"""


def run(root: Path, *command: str) -> str:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dvc(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two stages that have run, a file tracked by `dvc add`, a remote and an experiment."""
    root = tmp_path_factory.mktemp("dvc") / "repository"
    (root / "data").mkdir(parents=True)
    (root / "folder/inner").mkdir(parents=True)
    run(root, "git", "init", "--quiet", "--initial-branch=main")
    run(root, "git", "config", "user.name", "A User")
    run(root, "git", "config", "user.email", "user@example.invalid")
    dvc(root, "init", "--quiet")
    (root / ".dvc/config").write_text(CONFIG.format(url=root.parent / "store"))
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "params.yaml").write_text("number: 1\nother: {name: x}\n")
    (root / "data/rows.txt").write_text("rows")
    (root / "folder/one.txt").write_text("one")
    (root / "folder/inner/zwei \u00fc.txt").write_text("two")
    dvc(root, "add", "--quiet", "data/rows.txt")
    dvc(root, "repro", "--quiet")
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "--quiet", "--message", "a state to start from")
    dvc(root, "exp", "run", "--quiet", "--name", "mine", "--set-param", "number=2")
    run(root, "git", "checkout", "--quiet", "--", ".")
    dvc(root, "checkout", "--quiet", "--force")
    dvc(root, "exp", "run", "--quiet", "--queue", "--name", "waiting", "--set-param", "number=3")
    return root


@pytest.fixture
def repo(root: Path) -> Iterator[DvcRepository]:
    with open_repository(root) as opened:
        yield opened


def lock(root: Path) -> dict[str, dict[str, str]]:
    """The outputs in dvc.lock, by path."""
    stages = YAML(typ="safe").load(root / "dvc.lock")["stages"]
    return {out["path"]: out for stage in stages.values() for out in stage["outs"]}


def test_the_stages_and_what_they_depend_on_are_those_of_dvc_yaml(repo):
    assert repo.stage_names() == {"make@a", "make@b", "pack"}
    assert repo.dependencies() == {"data/rows.txt", "folder", "params.yaml"}
    assert repo.unpushed_outputs() == {"a.txt", "b.txt"}


def test_a_changed_file_that_dvc_add_tracks_is_listed(repo, root):
    assert repo.changed_sources() == []
    (root / "data/rows.txt").write_text("more rows")
    try:
        assert repo.changed_sources() == ["data/rows.txt"]
    finally:
        (root / "data/rows.txt").write_text("rows")


def test_hashes_are_those_of_dvc_lock_and_of_lathes_own_reading(repo, root):
    for path, out in lock(root).items():
        hashed = repo.hash_path(path)
        assert hashed is not None
        assert hashed[0] == out["md5"] == hash_path(root / path)
    md5, files = repo.hash_path("packed")
    assert set(files) == {"one.txt", "inner/zwei \u00fc.txt"}
    assert hash_folder(files) == md5
    assert hash_path(repo.cached_file(md5)) == md5.removesuffix(".dir")
    assert {entry["relpath"]: entry["md5"] for entry in json.loads(repo.cached_file(md5).read_text())} == files
    assert repo.hash_path("none") is None
    assert repo.hash_path("a.txt") == (lock(root)["a.txt"]["md5"], {})


def test_an_empty_folder_has_dvcs_hash(repo, root):
    (root / "empty").mkdir()
    assert repo.hash_path("empty")[0] == hash_path(root / "empty") == hash_folder({})
    (root / "empty").rmdir()


def test_a_cached_file_has_the_contents_of_its_output(repo, root):
    md5 = lock(root)["a.txt"]["md5"]
    assert repo.cached_file(md5).read_text() == "a"
    assert repo.cached_file(md5).is_relative_to(repo.cache_folder)
    assert not repo.cached_file("0" * 32).exists()


def test_a_checkout_puts_outputs_back_over_what_is_there(repo, root):
    (root / "a.txt").unlink()
    (root / "b.txt").write_text("changed")
    repo.checkout()
    assert ((root / "a.txt").read_text(), (root / "b.txt").read_text()) == ("a", "b")


def test_experiments_that_wait_are_listed_and_those_that_ran_are_kept_for_exp_show(repo, root):
    assert repo.queued_experiments() == ["waiting"]
    assert [(task.name, task.status, task.log) for task in repo.list_queue()] == [("waiting", "Queued", None)]
    ref = run(root, "git", "for-each-ref", "--format=%(objectname)", "refs/exps/*/*/mine").strip()
    assert ref
    cache = repo._repo.experiments.cache
    cache.delete(ref)
    assert cache.get(ref) is None
    repo.cache_experiment(ref)
    assert cache.get(ref).params["params.yaml"]["data"]["number"] == 2


def test_a_remote_is_written_listed_read_and_deleted(repo, root):
    storage = repo.remote("store")
    folder = storage.join("inner", "folder")
    assert folder == f"{root.parent}/store/inner/folder"
    storage.disable_retries()
    storage.write(f"{folder}/object", b"content")
    assert storage.exists(f"{folder}/object")
    assert storage.list_files(folder) == ["object"]
    assert storage.read(f"{folder}/object", most_bytes=100) == b"content"
    storage.delete_file(f"{folder}/object")
    storage.delete_folder(folder)
    assert not storage.exists(folder)
    storage.delete_folder(folder)


def test_runs_and_files_are_pushed_once(repo, root):
    runs = repo.push_run_cache("store")
    assert len(runs) >= 3
    for file in runs:
        assert {"cmd", "deps", "outs"} <= set(YAML(typ="safe").load(file))
    md5, files = repo.hash_path("packed")
    assert repo.push_files({md5, *files.values()}, "store") == (3, 0)
    assert repo.push_files({md5, *files.values()}, "store") == (0, 0)
    assert hash_path(root.parent / "store/files/md5" / md5[:2] / md5[2:]) == md5.removesuffix(".dir")


def test_the_configuration_is_read_and_the_local_one_added_to(repo, root):
    for config in (repo.config, dvc_api.read_config(root)):
        assert config["core"]["remote"] == "store"
        assert config["remote"]["store"]["url"] == f"{root.parent}/store"
        assert config["cache"]["type"] == ["copy"]
    dvc_api.update_local_config(root, {"remote": {"store": {"jobs": 3}}, "core": {"check_update": "false"}})
    dvc_api.update_local_config(root, {"core": {"site_cache_dir": "/tmp/site"}})
    with open_repository(root) as again:
        assert again.local_config["core"] == {"check_update": "false", "site_cache_dir": "/tmp/site"}
        assert again.config["remote"]["store"]["jobs"] == 3
    (root / ".dvc/config.local").unlink()


def test_a_command_runs_in_this_process_and_has_its_exit_code(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    assert dvc_api.run_command(["stage", "list", "--name-only"]) == 0
    assert "pack" in capsys.readouterr().out
    assert dvc_api.run_command(["repro", "no-such-stage"]) == 255


def test_the_stages_have_their_commands_each_after_what_it_depends_on(repo, root):
    stages = {stage.name: stage for stage in repo.list_commands()}
    assert set(stages) == {"make@a", "make@b", "pack"}
    assert stages["make@b"].commands == ("python -c \"open('b.txt', 'w').write('b')\"",)
    assert stages["pack"].folder == root


def test_one_stage_comes_from_the_cache_or_has_the_exit_code_of_its_command(root, monkeypatch):
    monkeypatch.chdir(root)
    text = (root / "dvc.yaml").read_text()
    further = "  after:\n    cmd: exit 3\n    deps: [packed]\n    outs: [after]\n"
    (root / "dvc.yaml").write_text(f"{text}{further}  lost:\n    cmd: exit 0\n    deps: [none]\n")
    (root / "a.txt").unlink()
    try:
        with open_repository(root) as repo:
            names = [stage.name for stage in repo.list_commands()]
            assert names.index("pack") < names.index("after")
            assert repo.reproduce_alone("make@a") == 0
            assert (root / "a.txt").read_text() == "a"
            assert repo.reproduce_alone("after") == 3
            with refused("dvc", "lost", kept=False):
                repo.reproduce_alone("lost")
    finally:
        (root / "dvc.yaml").write_text(text)


def test_the_links_that_work_are_tried_on_the_disk(root):
    kinds = dvc_api.find_link_types(root, root / "file")
    assert {"hardlink", "symlink", "copy"} <= set(kinds)


def test_a_lock_cut_short_is_not_complete(root):
    tree = YAML(typ="safe").load(root / "dvc.lock")
    assert dvc_api.is_complete_lock(tree)
    del tree["stages"]["pack"]["cmd"]
    assert not dvc_api.is_complete_lock(tree)
    assert not dvc_api.is_complete_lock(None)


def test_overrides_are_applied_and_sweeps_expanded_in_dvcs_order(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("number: 1 # a comment\nother: {name: x}\n")
    dvc_api.apply_overrides(file, ["number=5e-05", "other.name=y"])
    assert YAML(typ="safe").load(file) == {"number": 5e-05, "other": {"name": "y"}}
    assert "# a comment" in file.read_text()
    assert dvc_api.expand_sweep(["a=1", "b=2"], "params.yaml") == [["a=1", "b=2"]]
    runs = dvc_api.expand_sweep(["a=1,2", "b=3,4"], "params.yaml")
    assert runs == [["a=1", "b=3"], ["a=1", "b=4"], ["a=2", "b=3"], ["a=2", "b=4"]]
    for wrong in (["number=[1"], ["number"], ["none.of=1"]):
        with pytest.raises(OverrideError) as caught:
            dvc_api.apply_overrides(file, wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(OverrideError):
        dvc_api.expand_sweep(["number=1,[2"], "params.yaml")


def test_an_error_of_dvc_is_one_line(tmp_path):
    run(tmp_path, "git", "init", "--quiet")
    with refused("dvc", "you are not inside of a DVC repository", kept=False), open_repository(tmp_path):
        pass
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_such_setting = 1\n")
    with refused("dvc", "extra keys not allowed", kept=False) as caught:
        dvc_api.read_config(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / ".dvc/config").write_text("")
    (tmp_path / "dvc.yaml").write_text("stages:\n  a: 1\n")
    with refused("dvc", "dvc.yaml", kept=False) as caught, open_repository(tmp_path) as damaged:
        damaged.stage_names()
    assert "\n" not in str(caught.value)


def test_sources_and_files_go_to_a_remote_that_no_file_names_and_come_from_it(root: Path, tmp_path: Path) -> None:
    remote = {"remote": {"other": {"url": str(tmp_path / "other")}}}
    clone = tmp_path / "clone"
    with open_repository(root, remote) as repo:
        assert repo.list_sources() == ["data/rows.txt.dvc"]
        assert repo.push_sources("other") == 1
        assert repo.push_sources("other") == 0
        hashed = repo.hash_path("packed")
        assert hashed is not None
        folder, files = hashed
        assert repo.push_files({folder, *files.values()}, "other") == (len(set(files.values())) + 1, 0)
    run(root, "git", "clone", "--quiet", str(root), str(clone))
    with open_repository(clone, remote) as repo:
        assert repo.fetch_sources("other") == 1
        assert repo.fetch_sources("other") == 0
        assert repo.fetch_files({folder}, "other") == (1, 0)
        assert repo.fetch_files(set(files.values()), "other") == (len(set(files.values())), 0)
        repo.checkout([str(clone / "data/rows.txt")])
        assert repo.fetch_files({"0" * 32}, "other")[1] == 1
    assert (clone / "data/rows.txt").read_text() == "rows"


def test_the_key_of_a_host_is_checked_only_while_it_is_asked_for() -> None:
    from dvc_ssh import SSHFileSystem

    settings = {"host": "box"}
    with dvc_api.check_host_keys(["/etc/known"]):
        inside = SSHFileSystem(**settings).fs_args
    assert (inside["known_hosts"], inside["agent_forwarding"]) == (["/etc/known"], False)
    assert "known_hosts" not in SSHFileSystem(**settings).fs_args
