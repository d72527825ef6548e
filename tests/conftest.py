"""Checkouts to run the real scripts in, and a model small enough for seconds."""

import gc
import json
import logging
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import preloaded
import pytest
import refusals
import yaml
from ruamel.yaml import YAML
from shared import folder_of_run, made_once
from toy import toy_text

from lathe.common import paths
from lathe.common.jsonl import write_jsonl
from lathe.common.metric_files import unwrap_list
from lathe.config import params
from lathe.config.load import load

# Enough for every stage to do its work, not to do it well.
# What stages are made of that the committed parameters make none of.
EMPTY_LISTS = {"${benchmark.tasks}", "${sampling.files}", "${export.formats}"}
SMALL = {
    "model": "small",
    "dataset": "few",
    "training.max_length": 256,
    "training.max_steps": 4,
    "training.per_device_train_batch_size": 4,
    "training.logging_steps": 1,
    "training.eval_steps": 2,
    "training.learning_rate": 0.01,
    "generate.max_new_tokens": 12,
    "generate.n_ctx": 256,
    "generate.n_parallel": 4,
    "generate.max_rows": 6,
    "quantize.types": ["Q8_0", "Q4_K_M"],
}
# Changes of it for a model of another kind: what is asked is whether every stage takes it.
FEW = {
    "quantize.types": ["Q8_0"],
    "generate.max_rows": 2,
    "generate.max_new_tokens": "auto",
    "training.max_steps": 2,
    "training.eval_steps": 2,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-messages", action="store_true", help="keep whole messages of refusals in tests/messages")


def pytest_configure(config: pytest.Config) -> None:
    # As in stages/_path.py, before a test module imports torch: a training of a test that shares two cores with
    # another took twice the processor time where its threads spun while they waited.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    refusals.update = config.getoption("--update-messages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: no process is left with one of them while the others have ended."""
    folders = ("pipeline", "service", "stage", "gpu", "unit")
    items.sort(key=lambda item: folders.index(item.path.parent.name))
    for item in items:
        if item.get_closest_marker("gpu") and not _can_run_gpu_tests():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    preloaded.note_imports()
    # Trainings ask for collections of garbage, which took a second each with thousands of collected tests to look at.
    gc.collect()
    gc.freeze()


@cache
def _can_run_gpu_tests() -> bool:
    import torch

    return torch.cuda.is_available() or os.environ.get("LATHE_GPU_TESTS_ON_CPU") == "1"


@pytest.fixture(autouse=True)
def _dvc_logs_to_open_streams() -> None:
    """Drop handlers of DVC's log whose stream, that of an earlier test, is closed: DVC raises as it writes to one."""
    for name in ("dvc", "dvc_data", "dvc_objects", "dvc_render"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
                logger.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def _preloading(tmp_path_factory: pytest.TempPathFactory) -> None:
    preloaded.set_up(folder_of_run(tmp_path_factory))


def make_small_model(folder: Path) -> None:
    """Write a Llama of one layer, built like the tiny one but hardly trained."""
    from dataclasses import replace

    from lathe.sources.builtin import tiny_model

    folder.mkdir()
    recipe = replace(
        tiny_model.RECIPE,
        intermediate_size=256,
        num_hidden_layers=1,
        documents=400,
        steps=3,
        batch_size=8,
        threads=1,
    )
    tiny_model.build(folder, 1, recipe)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model; LATHE_SMALL_MODEL names one made elsewhere."""
    if made := os.environ.get("LATHE_SMALL_MODEL"):
        return Path(made)
    return made_once(tmp_path_factory, "small_model", make_small_model)


class Checkout:
    """A copy of this repository, committed to Git, in a folder of its own."""

    def __init__(self, root: Path, environment: dict[str, str] | None = None) -> None:
        self.root = root
        self.environment = environment or {
            **preloaded.get_environment(),
            "PATH": os.pathsep.join([str(preloaded.folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HF_HUB_OFFLINE": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
        }

    def without_preloading(self) -> "Checkout":
        """Return the same checkout with processes of their own from their first import on."""
        folders = self.environment["PATH"].split(os.pathsep)
        path = os.pathsep.join(folder for folder in folders if folder != str(preloaded.folder))
        return Checkout(self.root, {**self.environment, "PATH": path})

    def run(
        self, *command: str, check: bool = True, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout; a failure that is not expected shows what it printed."""
        environment = {**self.environment, **(env or {})}
        if str(preloaded.folder) in environment["PATH"]:
            if command[:3] == (sys.executable, "-m", "lathe"):
                command = ("python3", *command[1:])
            if command[0] == "python3" or command[:2] in (("dvc", "repro"), ("dvc", "exp")):
                preloaded.start()
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False, **options
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def check(self) -> None:
        """Run what `make repro` runs before `dvc repro`: it repairs what a kill cut short."""
        self.run(sys.executable, "-m", "lathe", "check", env={"PYTHONPATH": str(self.root / "src")})

    def stage(self, name: str, *items: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one stage's script."""
        return self.run("python3", f"stages/{name}.py", *items, check=check)

    def set(self, overrides: dict[str, Any]) -> None:
        """Edit params.yaml as a user would, comments kept."""
        editor, file = YAML(), self.root / "params.yaml"
        tree = editor.load(file)
        for key, value in overrides.items():
            *parents, last = key.split(".")
            section = tree
            for parent in parents:
                section = section[parent]
            section[last] = value
        editor.dump(tree, file)

    def json(self, path: str) -> Any:
        """Read a JSON file of the checkout, without the list around a report."""
        return unwrap_list(json.loads((self.root / path).read_text(encoding="utf-8")))

    def commit(self) -> None:
        """Commit everything that Git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "a state to start from")


def make_checkout(root: Path) -> Checkout:
    """Copy what Git knows or would add, select the toy, and make it a repository with one commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=paths.ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = paths.ROOT / name, root / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    (root / "params.yaml").write_text(toy_text(), encoding="utf-8")
    (root / ".llama.cpp").symlink_to(paths.LLAMA_CPP)
    checkout = Checkout(root)
    checkout.run("git", "init", "--quiet", "--initial-branch=main")
    checkout.run("git", "config", "user.name", "A User")
    checkout.run("git", "config", "user.email", "user@example.invalid")
    checkout.commit()
    return checkout


@pytest.fixture
def toy_params(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A params.yaml of the toy, which is this process's for the length of a test."""
    file = tmp_path_factory.mktemp("toy") / "params.yaml"
    file.write_text(toy_text(), encoding="utf-8")
    monkeypatch.setattr(paths, "PARAMS", file)
    monkeypatch.setattr(load, "__defaults__", (file, paths.PRESETS))
    return file


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout as a fresh clone has it."""
    return make_checkout(tmp_path / "lathe")


def add_small_inputs(checkout: Checkout, model: Path) -> None:
    """Give the checkout the small model and sixty rows of its own as local files, and select them."""
    from lathe.sources.builtin import household_commands

    shutil.copytree(model, checkout.root / "models/local/small")
    rows = household_commands.make_rows(1)["train"][:60]
    folder = checkout.root / "data/local"
    with (folder / "few.jsonl").open("w") as lines:
        for row in rows:
            ask, reply = (message["content"] for message in row["messages"])
            lines.write(json.dumps({"ask": ask, "reply": reply}) + "\n")
    presets = checkout.root / "presets.yaml"
    tree = YAML().load(presets)
    tree["models"]["small"] = {"source": "local", "path": "models/local/small"}
    tree["datasets"]["few"] = {
        "source": "local",
        "path": "data/local/few.jsonl",
        "prompt": "ask",
        "completion": "reply",
    }
    YAML().dump(tree, presets)
    checkout.run("dvc", "add", "--quiet", "data/local/few.jsonl", "models/local/small")
    checkout.set(SMALL)
    checkout.commit()


@pytest.fixture
def small_checkout(checkout: Checkout, small_model: Path) -> Checkout:
    """A checkout that runs the whole pipeline in seconds, and has not yet."""
    add_small_inputs(checkout, small_model)
    return checkout


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Checkout:
    """A small checkout whose whole pipeline has run and is committed; to be copied, not changed."""

    def make(folder: Path) -> None:
        make_reproduced(folder / "lathe", small_model)

    return Checkout(made_once(tmp_path_factory, "reproduced", make) / "lathe")


def make_reproduced(root: Path, model: Path) -> None:
    """Make a small checkout, run its whole pipeline, and commit what that has made."""
    checkout = make_checkout(root)
    add_small_inputs(checkout, model)
    ran = checkout.run("dvc", "repro").stdout
    for name, stage in yaml.safe_load((root / "dvc.yaml").read_text())["stages"].items():
        off = EMPTY_LISTS.intersection(map(str, stage.get("matrix", {}).values()))
        assert (f"Running stage '{name}" in ran) == (not off), name
    checkout.commit()


def copy_of(checkout: Checkout, root: Path) -> Checkout:
    """Copy a checkout with its results and its cache; what is read-only, as DVC's and Git's objects are, is linked."""

    def link_or_copy(source: str, target: str) -> None:
        if os.stat(source).st_mode & 0o222:
            shutil.copy2(source, target)
        else:
            os.link(source, target)

    shutil.copytree(checkout.root, root, symlinks=True, copy_function=link_or_copy)
    return Checkout(root)


def changed(chosen: params.Params, changes: dict[str, Any]) -> params.Params:
    """Return the parameters with keys changed, each named with its section or, in `training`, alone."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if key == "seed":
            chosen = chosen.model_copy(update={"seed": value})
            continue
        section = section or "training"
        inner = getattr(chosen, section)
        assert name in type(inner).model_fields, key
        chosen = chosen.model_copy(update={section: inner.model_copy(update={name: value})})
    return chosen


def learnt_by_heart() -> dict[str, list[dict[str, Any]]]:
    """Rows of which training learns too much: at a constant rate of 0.004, validation is best after 6 steps."""
    train, validation = (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]}
        for answer in ("yes, yes, yes", "yes, no, no")
    )
    return {"train": [train] * 4, "validation": [validation]}


def write_splits(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> dict[str, Path]:
    """Write processed splits as `preprocess` does, and return their files by name, as training takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.jsonl" for split in splits}
    for split, file in files.items():
        write_jsonl(splits[split], file)
    return files


def output_hashes(checkout: Checkout) -> dict[str, list[str]]:
    """What dvc.lock says of the outputs of every item that dvc.yaml now has."""
    lock = yaml.safe_load((checkout.root / "dvc.lock").read_text())["stages"]
    listed = checkout.run("dvc", "stage", "list", "--all", "--name-only").stdout.split()
    return {item: [out["md5"] for out in lock[item]["outs"]] for item in listed if item in lock}
