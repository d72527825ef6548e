"""Files and names from outside: whatever they hold, there is one line that says so, soon, and in little memory."""

import contextlib
import gzip
import http.server
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lathe.common import git, json_files, jsonl, paths
from lathe.common.errors import InputError
from lathe.config.base import check_plain_address
from lathe.config.presets import HubModel
from lathe.config.yaml_files import MOST_DEPTH, parse_yaml, read_marked_yaml, read_yaml
from lathe.data import split_files
from lathe.evaluation.judge import judged_rows
from lathe.experiments.search import storage
from lathe.experiments.tracking import bounded_requests, mlflow_tracker
from lathe.experiments.tracking.run_files import Context, MirroredRun
from lathe.experiments.tracking.targets import MlflowTarget
from lathe.experiments.tracking.tracker import TrackerUnreachableError
from lathe.provenance import revisions, trace

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))

# YAML that raises anything, fills the memory or ends the process, by what is wrong with it.
YAML_FILES = {
    "brackets": "a: " + "[" * 300_000,
    "braces": "{a: " * 5_000,
    "dashes": "- " * 300_000,
    "blocks": "".join(" " * depth + "a:\n" for depth in range(MOST_DEPTH + 10)),
    "in itself": "a: &a [*a]",
    "aliases": BOMB,
    "no such day": "a: 2020-13-45",
    "no number": "a: !!float x",
    "number of 5,000 digits": "a: " + "9" * 5_000,
    "class of Python": "a: !!python/object/apply:os.system [id]",
    "scalar as an ordered map": "a: !!omap x",
    "merge of a number": "a: &a {b: 1}\nc: {<<: [*a, 1]}",
    "control character": "a: \0",
    "half a surrogate pair": 'a: "\\ud800"',
    "cut": 'a: "',
}


@pytest.mark.parametrize("text", YAML_FILES.values(), ids=YAML_FILES)
def test_yaml_that_is_a_trap_is_refused_in_one_line_at_once(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    began = time.perf_counter()
    with pytest.raises(InputError) as refusal:
        read_yaml(file)
    assert time.perf_counter() - began < 5
    assert str(refusal.value).startswith("recipe.yaml")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("text", YAML_FILES.values(), ids=YAML_FILES)
def test_yaml_that_is_read_for_its_lines_raises_nothing_else(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with contextlib.suppress(InputError):
        read_marked_yaml(file)


def test_aliases_and_depth_as_people_write_them_are_read() -> None:
    tree = parse_yaml("base: &base {r: 8, modules: [q, k]}\none: *base\ntwo: {<<: *base, r: 16}", "recipe.yaml")
    assert tree["one"] == {"r": 8, "modules": ["q", "k"]}
    assert tree["two"] == {"r": 16, "modules": ["q", "k"]}


JSON_FILES = {"deep": "[" * 100_000, "deep objects": '{"a":' * 100_000, "digits": "9" * 5_000, "cut": '{"a": "'}


@pytest.mark.parametrize("text", JSON_FILES.values(), ids=JSON_FILES)
def test_json_that_is_a_trap_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    for read in (json_files.read_json, jsonl.read_jsonl):
        with pytest.raises(InputError, match=r"config\.json.*not (valid|a) JSON") as refusal:
            read(file)
        assert "\n" not in str(refusal.value)


# What ends a line for Python, and not for Git.
SEPARATORS = ["\u2028", "\u2029", "\x85", "\x1c", "\x1e", "\x0b", "\x0c"]


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A commit in a repository of its own, with every such separator in its subject, and a byte that is no UTF-8."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    subject = "a subject" + "".join(f"{separator}forged" for separator in SEPARATORS)
    (tmp_path / "message").write_bytes(subject.encode() + b" \xe9\n")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    git.run_git("config", "user.name", "A User")
    git.run_git("config", "user.email", "user@example.invalid")
    tree = git.run_git("hash-object", "-t", "tree", "-w", "--stdin").decode().strip()
    return git.run_git("commit-tree", tree, "-F", str(tmp_path / "message")).decode().strip()


def test_a_subject_with_any_separator_is_one_experiment(commit: str) -> None:
    git.run_git("update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/mine", commit)
    [experiment] = revisions.list_experiments()
    assert (experiment.name, experiment.commit) == ("mine", commit)
    assert all(separator in experiment.message for separator in SEPARATORS)


def test_a_subject_with_any_separator_is_one_traced_commit(commit: str) -> None:
    [traced] = trace._describe_commits([commit])
    assert (traced.commit, traced.experiment) == (commit, None)
    assert traced.subject.count("forged") == len(SEPARATORS)


def test_a_name_that_is_no_utf_8_is_listed(commit: str, tmp_path: Path) -> None:
    file = tmp_path / "n\udce9.txt"
    file.write_text("x")
    assert "n\udce9.txt" in git.list_paths("ls-files", "--others")


@pytest.mark.parametrize("commit_file", ["params.yaml", "presets.yaml", "dvc.lock"])
@pytest.mark.parametrize("text", ["a: " + "[" * 300_000, "a: 2020-13-45", "[]", "\udcff"])
def test_files_of_anothers_commit_are_refused_in_one_line(
    commit: str, tmp_path: Path, commit_file: str, text: str
) -> None:
    for name in ("params.yaml", "presets.yaml", "dvc.lock"):
        (tmp_path / name).write_bytes(b"model: m\ndataset: d\nmodels: {}\ndatasets: {}\nstages: {}\n")
    (tmp_path / commit_file).write_bytes(text.encode("utf-8", "surrogateescape"))
    git.run_git("add", "params.yaml", "presets.yaml", "dvc.lock")
    git.run_git("commit", "--quiet", "-m", "theirs")
    revision = revisions.Revision("theirs", git.find_head())
    with pytest.raises(InputError) as refusal:
        _ = (revision.parameters, revision.stages)
    assert "\n" not in str(refusal.value)


def test_a_rubric_outside_of_the_checkout_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lathe"
    root.mkdir()
    monkeypatch.setattr(paths, "ROOT", root)
    (tmp_path / "id_rsa").write_text("a key")
    (root / "rubric.md").symlink_to(tmp_path / "id_rsa")
    (root / "own.md").write_text("Score.")
    assert judged_rows.read_rubric(root / "own.md") == "Score."
    for name in ("../id_rsa", str(tmp_path / "id_rsa"), "rubric.md"):
        with pytest.raises(InputError, match="lies outside of the checkout"):
            judged_rows.read_rubric(root / name)


@pytest.mark.parametrize(
    "revision", ["../../victim", "/etc/passwd", "a/../../b", "..", "a//b", "-x", "a\n", "refs/../x"]
)
def test_a_revision_that_is_a_path_elsewhere_is_refused(revision: str) -> None:
    with pytest.raises(ValueError, match="is no commit, tag or branch"):
        HubModel(source="hub", id="a/b", revision=revision)


@pytest.mark.parametrize(
    "revision", ["main", "v1.0", "refs/convert/parquet", "refs/pr/12", "a" * 40, "v2.0+cu12", "x_y-z"]
)
def test_revisions_as_they_are_written_are_taken(revision: str) -> None:
    assert HubModel(source="hub", id="a/b", revision=revision).revision == revision


@pytest.mark.parametrize("name", ["$(id).xlsx", "a b;id.zip", "`id`.pkl", "-rf.tar", "it's mine.orc"])
def test_a_name_that_a_shell_would_read_is_in_no_command_to_copy(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("x")
    with pytest.raises(InputError) as refusal:
        split_files._refuse_other_container(file)
    command = str(refusal.value).partition("; convert it: ")[2]
    assert "FILE" in command
    assert file.stem not in command


def test_an_environment_of_a_folder_above_is_not_used(tmp_path: Path) -> None:
    """Whoever may write to /tmp could put one there, for every checkout below it; a temporary experiment's is ours."""
    (tmp_path / "lathe/stages").mkdir(parents=True)
    shutil.copy(paths.ROOT / "stages/_path.py", tmp_path / "lathe/stages/_path.py")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text("#!/bin/sh\necho pwned\n")
    python.chmod(0o755)
    bare = [sys.executable, "-I", "-S", str(tmp_path / "lathe/stages/_path.py")]  # without the packages
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert "pwned" not in done.stdout
    assert "lacks Lathe's packages; run `make setup`" in done.stderr
    temporary = tmp_path / "main/.dvc/tmp/exps/tmpabc/stages"
    temporary.mkdir(parents=True)
    shutil.copy(paths.ROOT / "stages/_path.py", temporary / "_path.py")
    (tmp_path / "main/presets.yaml").touch()
    shutil.copytree(tmp_path / ".venv", tmp_path / "main/.venv")
    done = subprocess.run([*bare[:-1], str(temporary / "_path.py")], capture_output=True, text=True, check=False)
    assert done.stdout == "pwned\n"


class Endless(http.server.BaseHTTPRequestHandler):
    """Answers without end, plain or packed a thousand times smaller."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/redirect" else 200)
        self.send_header("Location", "/")
        part = b"a" * (1 << 20)
        if self.path == "/packed":
            self.send_header("Content-Encoding", "gzip")
            part = gzip.compress(bytes(1 << 30))
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endless() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/", "/redirect", "/packed"])
def test_a_trackers_answer_without_end_is_ended(endless: str, path: str) -> None:
    import requests

    bounded_requests.bound_responses()
    with pytest.raises(requests.exceptions.ConnectionError, match="has not ended after 64 MiB"):
        requests.get(endless + path, timeout=60)


@pytest.mark.heavy
def test_a_tracker_that_answers_without_end_is_one_that_cannot_be_reached(endless: str, tmp_path: Path) -> None:
    record = MirroredRun(tmp_path, Context())
    mirror = mlflow_tracker.MlflowMirror(MlflowTarget(endless, "lathe"), record)
    with pytest.raises(TrackerUnreachableError, match="has not ended after 64 MiB"), mirror._translate_errors():
        mirror._require_experiment()


# Passwords.

PASSWORD = "s3cret"
RAW = ["@", "/", "?", "#", "@/", "?@", "//", ":@"]


@pytest.mark.parametrize("sign", RAW)
def test_a_password_with_a_sign_that_ends_it_is_refused_and_not_shown(sign: str) -> None:
    for url in (f"postgresql://user:{PASSWORD}{sign}{PASSWORD}@host/db", f"mysql://user:{sign}{PASSWORD}@host/db?a=b"):
        with pytest.raises(InputError, match="%40") as refusal:
            storage.open_storage(url, "study")
        assert PASSWORD not in str(refusal.value)


@pytest.mark.parametrize("sign", ["", *RAW, "%40", ":"])
def test_an_address_is_shown_without_its_password(sign: str) -> None:
    shown = storage.hide_password(f"postgresql://user:{PASSWORD}{sign}{PASSWORD}@host:5432/db?password={PASSWORD}")
    assert PASSWORD not in shown
    assert shown == "postgresql://user@host:5432/db"


@pytest.mark.parametrize("sign", ["", *RAW, "\n", "%40"])
def test_an_address_in_parameters_with_a_password_is_refused_and_not_shown(sign: str) -> None:
    for address in (f"http://user:{PASSWORD}{sign}{PASSWORD}@host/v1", f"http://host/v1?key={PASSWORD}{sign}"):
        with pytest.raises(ValueError, match="is not a plain address") as refusal:
            check_plain_address(address)
        assert PASSWORD not in str(refusal.value)
