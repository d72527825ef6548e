"""`lathe init`: a repository of one's own runs, takes updates, and is refused or complete."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import Checkout, make_checkout
from refusals import refused
from ruamel.yaml import YAML

from lathe.adopt import lathe_files, new_repository, own_files, update
from lathe.common import paths
from lathe.config.load import load
from lathe.experiments.recipes import read_overrides


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone of Lathe that repositories are made from."""
    checkout = make_checkout(tmp_path_factory.mktemp("source") / "lathe")
    checkout.environment |= {"PYTHONPATH": str(checkout.root / "src"), "EMAIL": "user@example.invalid"}
    checkout.environment |= {f"GIT_{who}_NAME": "A User" for who in ("AUTHOR", "COMMITTER")}
    return checkout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty rows of one's own."""
    from lathe.sources.builtin import household_commands

    file = tmp_path_factory.mktemp("data") / "My rows.jsonl"
    with file.open("w") as lines:
        for row in household_commands.make_rows(1)["train"][:60]:
            ask, reply = (message["content"] for message in row["messages"])
            lines.write(json.dumps({"ask": ask, "reply": reply}) + "\n")
    return file


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory, source: Checkout, data: Path, small_model: Path) -> Checkout:
    """A repository with a model and data of one's own."""
    folder = tmp_path_factory.mktemp("adopted") / "household"
    columns = ["--prompt", "ask", "--completion", "reply"]
    lathe(source, "init", str(folder), "--model", str(small_model), "--dataset", str(data), *columns)
    return Checkout(folder, source.environment)


def lathe(checkout: Checkout, *words: str, check: bool = True):
    return checkout.run(sys.executable, "-m", "lathe", *words, check=check)


def git(checkout: Checkout, *words: str) -> str:
    return checkout.run("git", *words).stdout


def test_a_new_repository_is_committed_and_valid(adopted):
    assert git(adopted, "status", "--porcelain") == ""
    subjects = git(adopted, "log", "--format=%s").splitlines()
    assert [re.sub(r"[0-9a-f]{10}", "COMMIT", line) for line in subjects] == [
        "household: a repository of its own",
        "Lathe 0.1.0 (COMMIT)",
    ]
    lathe(adopted, "check")
    assert lathe(adopted, "--version").stdout == f"lathe 0.1.0 ({adopted.root})\n"
    assert "household" in lathe(adopted, "experiments").stdout
    config = (adopted.root / ".dvc/config").read_text()
    assert 'type = "hardlink,symlink"' in config
    assert "s3://" not in config
    # What `dvc repro` makes is what the recipe says.
    tree = lathe(adopted, "config").stdout
    recipe = lathe(adopted, "config", *(f"-S{text}" for text in ("seed=42", "lora.r=16"))).stdout
    assert tree == recipe


def test_a_new_repository_has_nothing_that_is_for_work_on_lathe_itself(adopted):
    names = git(adopted, "ls-files").splitlines()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", ".github/", ".ci/", "metrics/"))]
    assert not {"mkdocs.yml", "docs/build.py", "dvc.lock", "CHANGELOG.md"} & set(names)
    assert {"dvc.yaml", "Makefile", "docs/adopting.md", "schemas/params.json", "stages/_path.py"} <= set(names)
    left_out = {name for name in git_files() if name.startswith(lathe_files.LEFT_OUT)}
    own = {"README.md", "experiments/household.yaml", "data/local/household.jsonl.dvc", "models/local/household.dvc"}
    own |= {"data/local/.gitignore", "models/local/.gitignore"}
    assert set(names) - own == git_files() - left_out - own
    for target in re.findall(r"^([a-z-]+):", (adopted.root / "Makefile").read_text(), flags=re.MULTILINE):
        recipe = adopted.run("make", "--dry-run", "--always-make", target).stdout
        used = re.findall(r"pytest |benchmarks/|docs/|mkdocs|\.github|ruff |mypy$", recipe, flags=re.MULTILINE)
        assert used == [], target


def git_files() -> set[str]:
    listed = Checkout(paths.ROOT).run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout
    return {name for name in listed.splitlines() if (paths.ROOT / name).is_file() and not name.startswith(".llama.cpp")}


def test_a_new_repository_fetches_and_preprocesses_with_its_own_model(adopted):
    planned = adopted.run("dvc", "repro", "--dry", "--allow-missing", check=False).stdout
    assert "Running stage 'local_files@model'" in planned
    adopted.run("dvc", "repro", "fetch@model", "fetch@dataset", "preprocess")
    report = adopted.json("metrics/preprocess/report.json")
    assert sum(split["kept"] for split in report["splits"]) >= 55
    assert "switch" in lathe(adopted, "inspect", "--row", "1").stdout.lower()
    adopted.commit()


def test_an_update_keeps_what_the_user_has_changed(source, adopted, tmp_path):
    upstream = Checkout(tmp_path / "upstream", source.environment)
    source.run("git", "clone", "--quiet", str(source.root), str(upstream.root))
    mine = Checkout(tmp_path / "mine", source.environment)
    adopted.run("git", "clone", "--quiet", str(adopted.root), str(mine.root))

    assert "has the files of Lathe 0.1.0" in take(upstream, mine).stdout

    edit(mine, "params.yaml", "  r: 16 #", "  r: 8 #")
    edit(mine, "experiments/household.yaml", "training.learning_rate: 0.0001", "training.learning_rate: 0.0003")
    edit(mine, "presets.yaml", "# the base model", "# my model")
    refusal = take(upstream, mine, check=False)
    assert (refusal.returncode, "commit them first" in refusal.stderr) == (2, True)
    mine.commit()

    edit(upstream, "src/lathe/__init__.py", "0.1.0", "0.2.0")
    edit(upstream, "params.yaml", "use_dora: false # train", "use_dora: false # to train")
    with (upstream.root / "presets.yaml").open("a") as file:
        file.write("\n  another:\n    source: builtin\n")
    (upstream.root / "docs/new.md").write_text("# New\n")
    (upstream.root / "tests/new.py").write_text("new = True\n")
    (upstream.root / "docs/serving.md").unlink()
    upstream.commit()
    assert "Lathe 0.2.0" in take(upstream, mine).stdout

    assert git(mine, "status", "--porcelain") == ""
    assert lathe(mine, "--version").stdout.startswith("lathe 0.2.0 ")
    params = (mine.root / "params.yaml").read_text()
    assert "  r: 8 #" in params
    assert "# to train" in params
    assert "0.0003" in (mine.root / "experiments/household.yaml").read_text()
    presets = YAML(typ="safe").load(mine.root / "presets.yaml")
    assert {"household", "commands", "another"} <= set(presets["datasets"])
    assert "# my model" in (mine.root / "presets.yaml").read_text()
    assert (mine.root / "docs/new.md").exists()
    assert not (mine.root / "docs/serving.md").exists()
    assert not (mine.root / "tests").exists()
    lathe(mine, "check")

    edit(upstream, "params.yaml", "  r: 16 #", "  r: 12 #")
    upstream.commit()
    conflict = take(upstream, mine, check=False)
    assert conflict.returncode == 2
    assert conflict.stderr.startswith("error: params.yaml: changed here and in Lathe; ")
    mine.run("git", "merge", "--abort")
    assert git(mine, "status", "--porcelain") == ""


def take(upstream: Checkout, mine: Checkout, *, check: bool = True):
    return lathe(upstream, "init", str(mine.root), "--update", check=check)


def edit(checkout: Checkout, path: str, old: str, new: str) -> None:
    file = checkout.root / path
    text = file.read_text()
    assert text.count(old) == 1, old
    file.write_text(text.replace(old, new))


def test_without_a_model_there_is_a_valid_example_and_the_toy_s_parameters(source, tmp_path):
    lathe(source, "init", str(tmp_path / "My project"))
    made = Checkout(tmp_path / "My project", source.environment)
    lathe(made, "check")
    assert (made.root / "params.yaml").read_bytes() == (source.root / "params.yaml").read_bytes()
    listed = lathe(made, "experiments").stdout
    assert re.search(r"^my-project +The model my-project learns", listed, flags=re.MULTILINE)
    assert lathe(made, "config", "model", "-S", "model=my-project", "-S", "dataset=my-project").stdout == "my-project\n"


def test_models_and_datasets_of_the_hub_become_presets(source, tmp_path):
    lathe(source, "init", str(tmp_path / "mine"), "--name", "tuned", "--model", "Qwen/Qwen3-0.6B", "--dataset", "a/b")
    config = load(tmp_path / "mine/params.yaml", tmp_path / "mine/presets.yaml")
    assert (config.model.source, config.params.model) == ("hub", "tuned")
    assert config.dataset.model_dump(exclude_none=True) == {
        "source": "hub",
        "id": "a/b",
        "revision": "main",
        "train_split": "train",
    }


def test_a_command_in_a_repository_of_ones_own_makes_no_further_one(adopted, tmp_path):
    done = lathe(adopted, "init", str(tmp_path / "other"), check=False)
    assert done.returncode == 2
    assert "run this in a clone of Lathe" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("full", None, None, None), "folder-not-empty", "full"),
        (("full/file", None, None, None), "folder-not-empty", "file"),
        (("repository/sub/mine", None, None, None), "inside-repository", "repository"),
        (("mine", "My Name", None, None), "own-name", "--name My Name"),
        (("mine", "commands", None, None), "own-name", "--name commands"),
        (("qwen3-600m", None, None, None), "own-name", "--name qwen3-600m"),
        (("mine", None, "a/b", None), "missing-option", "--dataset"),
        (("mine", None, None, "a/b"), "missing-option", "--model"),
        (("mine", None, "no such", "a/b"), "missing-source", "--model no such"),
        (("mine", None, "a/b", "./none.jsonl"), "missing-source", "--dataset ./none.jsonl"),
        (("mine", None, "full/file", "a/b"), "missing-source", "--model full/file"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(tmp_path, monkeypatch, arguments, code, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_repository, "check_source", lambda: None)
    for name in ("full", "repository/sub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "full/file").touch()
    Checkout(tmp_path / "repository").run("git", "init", "--quiet")
    before = sorted(path for path in tmp_path.rglob("*") if ".git" not in path.parts)
    folder, *rest = arguments
    with refused(code, part):
        new_repository.create(Path(folder), *rest)
    assert sorted(path for path in tmp_path.rglob("*") if ".git" not in path.parts) == before


def test_a_model_that_is_none_leaves_no_folder(source, data, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    command = ["init", str(tmp_path / "mine"), "--model", str(tmp_path / "model"), "--dataset", str(data)]
    done = lathe(source, *command, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tokenizer_config.json" in done.stderr
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_without_lathe_s_commit_takes_no_update(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "check_source", lambda: None)
    with refused("not-adopted", str(tmp_path)):
        update.update(tmp_path)


@pytest.mark.parametrize("recipe", ["vikhr-8b", "gsm8k-grpo", "tiny"])
def test_parameters_are_edited_line_by_line(tmp_path, recipe):
    """As DVC would set them, but with all other lines and all comments as they were."""
    values = read_overrides(paths.ROOT / f"experiments/{recipe}.yaml")
    text = own_files.edit_params(paths.PARAMS.read_text(), values)
    (tmp_path / "params.yaml").write_text(text)
    params = load(tmp_path / "params.yaml").params
    for key, value in values.items():
        configured: object = params
        for step in key.split("."):
            configured = getattr(configured, step)
        if key == "grpo.rewards":
            configured = [reward.model_dump(exclude_none=True) for reward in configured]
        assert configured == value, key
    comments = re.compile(r"(?<= )#.*|^#.*", re.MULTILINE)
    assert comments.findall(text) == comments.findall(paths.PARAMS.read_text())
    changed = set(text.splitlines()) - set(paths.PARAMS.read_text().splitlines())
    assert len(changed) < len(values)
