"""dvc.yaml, the scripts, the parameters and the imports hold together."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
from dvc.repo import Repo
from dvc.utils import serialize

from lathe.common import paths, stage_dependencies
from lathe.common.code_closure import code_closure, is_code
from lathe.config import classifier_params, params, training_params
from lathe.config.base import section_of


@pytest.fixture(scope="module")
def all_stages():
    """Every stage of every dvc.yaml as DVC resolves it, those too that the committed parameters make none of."""

    def load_with_lists(path, fs):
        content = load_path(path, fs)
        if "benchmark" in content:
            content["benchmark"]["tasks"] = ["mmlu"]
            content["sampling"]["files"] = ["merged-f16"]
            content["export"]["formats"] = ["onnx"]
        return content

    load_path = serialize.load_path
    found = []
    for folder in (paths.ROOT, paths.CLASSIFIER):
        with mock.patch.object(serialize, "load_path", load_with_lists), Repo(str(folder)) as repo:
            found += [stage for stage in repo.index.stages if stage.cmd]
    return found


@pytest.fixture(scope="module")
def stages(all_stages):
    """Those of the main pipeline."""
    return [stage for stage in all_stages if Path(stage.path).parent == paths.ROOT]


def group(stage) -> str:
    return stage.name.split("@")[0]


def script(stage) -> Path:
    return Path(stage.path).parent / stage.cmd.split()[2]


def test_each_stage_depends_on_exactly_the_library_modules_that_its_script_imports(all_stages):
    for stage in all_stages:
        listed: set[Path] = set()
        for dep in stage.deps:
            path = (Path(stage.path).parent / str(dep.def_path)).resolve()
            listed |= set(path.rglob("*")) if path.is_dir() else {path}
        code = {path for path in listed if is_code(path) and "src" in path.relative_to(paths.ROOT).parts}
        assert code == set(code_closure(script(stage))), f"{stage.addressing}: run `make deps`"
        assert script(stage) in listed, f"{stage.addressing} does not depend on its own script"


# Of the library modules that a stage depends on: an edit of any line of them re-runs it.
MOST_LINES = {"card": 1100, "imatrix": 1050, "convert": 1050, "quantize": 750, "convert_adapter": 600}


@pytest.mark.parametrize(("name", "most"), MOST_LINES.items())
def test_a_stage_depends_on_few_lines_of_code(name, most):
    files = code_closure(paths.ROOT / f"stages/{name}.py")
    lines = {file.name: len(file.read_text().splitlines()) for file in files}
    assert sum(lines.values()) <= most, lines


def test_an_edit_of_the_hubs_code_runs_fetch_alone():
    scripts = (paths.ROOT / "stages").glob("[a-z]*.py")
    hub = paths.ROOT / "src/lathe/sources/hub.py"
    assert [file.stem for file in scripts if hub in code_closure(file)] == ["fetch"]


def test_dvc_yaml_is_as_make_deps_writes_it():
    for file in stage_dependencies.DVC_YAMLS:
        text = file.read_text()
        assert stage_dependencies.with_dependencies(text, file.parent) == text
        fewer = "\n".join(line for line in text.splitlines() if "src/lathe/models" not in line) + "\n"
        assert fewer != text
        assert stage_dependencies.with_dependencies(fewer, file.parent) == text


def test_each_stage_has_a_script_and_each_script_a_stage(all_stages):
    folders = (paths.ROOT / "stages", paths.CLASSIFIER / "stages")
    scripts = {file for folder in folders for file in folder.glob("*.py") if not file.name.startswith("_")}
    assert {script(stage) for stage in all_stages} == scripts


def test_the_main_pipeline_and_the_classifiers_share_no_stage_and_no_output(all_stages, stages):
    others = [stage for stage in all_stages if stage not in stages]
    assert others
    made = {out.fs_path for stage in stages for out in stage.outs}
    made_there = {out.fs_path for stage in others for out in stage.outs}
    assert not made & made_there
    assert not {dep.fs_path for stage in others for dep in stage.deps} & made
    assert not {dep.fs_path for stage in stages for dep in stage.deps} & made_there


def test_each_parameter_of_the_classifier_is_tracked_by_a_stage():
    text = (paths.CLASSIFIER / "dvc.yaml").read_text()
    for name, field in classifier_params.ClassifierParams.model_fields.items():
        section = section_of(field.annotation)
        for key in [name] if section is None else [f"{name}.{key}" for key in section.model_fields]:
            marks = (f"- {key}\n", f"${{{key}", f"- {key.partition('.')[0]}\n")
            assert any(mark in text for mark in marks), key


# Where a run is shown changes nothing of it: what a stage tracked here would run it again.
TRACKED_BY_NO_STAGE = {"tracking"}


def test_each_section_of_the_parameters_is_tracked_by_a_stage_or_drives_a_matrix():
    text = (paths.ROOT / "dvc.yaml").read_text()
    methods = get_args(training_params.Training.model_fields["method"].annotation)
    assert "- ${training.method}\n" in text
    for name in params.Params.model_fields:
        tracked = any(mark in text for mark in (f"- {name}\n", f"- {name}.", f"${{{name}", f"${{{name}."))
        assert (name in methods or tracked) == (name not in TRACKED_BY_NO_STAGE), name


def test_a_training_depends_on_the_parameters_of_its_own_method_alone(checkout):
    def tracked(method: str) -> set[str]:
        checkout.set({"training.method": method})
        with Repo(str(checkout.root)) as repo:
            [stage] = [stage for stage in repo.index.stages if stage.name == "train"]
        return {name for dep in stage.params for name in dep.params if dep.def_path == "params.yaml"}

    common = {"seed", "training", "sft", "lora", "quantization"}
    common |= {"preprocess.supervise", "preprocess.chat_template_kwargs", "preprocess.added_tokens"}
    assert tracked("sft") == common
    assert tracked("dpo") == common | {"dpo"}
    assert tracked("grpo") == common | {"grpo"}


def test_metrics_and_plots_stay_in_git_and_everything_else_in_the_cache(all_stages):
    for stage in all_stages:
        for out in stage.outs:
            path = str(out.def_path)
            if out.__class__.__name__ == "ParamsDependency":
                continue
            assert out.use_cache == (not path.startswith("metrics/")), path


def test_dvcs_run_cache_keeps_the_runs_of_every_stage_but_the_judges(all_stages):
    """What it refuses: outputs that persist, and files in Git that are neither metric nor plot (`Stage.run` of DVC)."""
    refused = [
        stage.name
        for stage in all_stages
        if stage.is_callback
        or stage.always_changed
        or any(out.persist or not (out.use_cache or out.is_metric or out.is_plot) for out in stage.outs)
    ]
    assert refused == ["judge"]


SCRIPTS = sorted(file for place in ("stages", "classify/stages") for file in (paths.ROOT / place).glob("[a-z]*.py"))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.relative_to(paths.ROOT).with_suffix("").as_posix())
def test_help_of_each_stage_says_what_it_reads_and_writes(file):
    done = subprocess.run([sys.executable, str(file), "--help"], capture_output=True, text=True, check=True)
    assert "\nreads " in done.stdout
    assert "\nwrites " in done.stdout


def test_a_stage_runs_the_code_of_its_own_checkout(tmp_path):
    """An editable install points to the main checkout; a temporary experiment must not run that."""
    for folder in ("stages", "src"):
        subprocess.run(["cp", "-r", str(paths.ROOT / folder), str(tmp_path / folder)], check=True)
    program = "import _path, lathe; print(lathe.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "stages",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "stages")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_the_readme_and_the_page_on_evaluation_show_the_committed_results():
    spec = importlib.util.spec_from_file_location("build", paths.ROOT / "docs/build.py")
    assert spec
    assert spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for page in build.PAGES:
        assert build.results() in page.read_text(), page


def test_the_page_on_architecture_has_a_line_for_every_script_package_module_recipe_and_benchmark():
    page = (paths.ROOT / "docs/architecture.md").read_text()
    lines = {name for line in page.splitlines() if line.startswith("| `") for name in re.findall("`([^`]+)`", line)}
    library = paths.ROOT / "src/lathe"
    packages = {f"{file.parent.relative_to(library)}/" for file in library.rglob("__init__.py")} - {"./"}
    scripts = {file.name for folder in ("stages", "benchmarks") for file in (paths.ROOT / folder).glob("*.py")}
    modules = {file.name for file in library.glob("*.py")} - {"__init__.py"}
    recipes = {file.name for file in (paths.ROOT / "experiments").glob("*.yaml")}
    assert packages | scripts | modules | recipes <= lines, (packages | scripts | modules | recipes) - lines
