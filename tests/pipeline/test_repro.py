"""One real `dvc repro` on a small configuration, then what re-runs after each kind of change."""

import json
import re
import shutil

import pytest
import yaml
from conftest import SMALL, Checkout, copy_of, output_hashes
from shared import processor_seconds

from lathe.common import dotted_keys


def ran(done) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", done.stdout)


def cached(done) -> list[str]:
    return re.findall(r"Stage '([^']+)' is cached - skipping run", done.stdout)


@pytest.fixture(scope="module")
def checkout(reproduced, tmp_path_factory) -> Checkout:
    """A checkout whose pipeline has run once; each test leaves it reproduced."""
    return copy_of(reproduced, tmp_path_factory.mktemp("repro") / "lathe")


def test_every_artifact_is_measured_on_both_splits(checkout):
    for split in ("validation", "test"):
        report = checkout.json(f"metrics/evaluate/{split}.json")
        assert list(report) == ["base", "base_few_shot", "merged", "Q8_0", "Q4_K_M"]
        for scores in report.values():
            assert 0 <= scores["exact_match"] <= 1
            assert 0 <= scores["json_valid"] <= 1
            assert scores["perplexity"] > 1
            assert scores["bytes"] > 1000


def test_nothing_frozen_moved_and_the_loss_fell(checkout):
    proof = checkout.json("metrics/train/freeze_proof.json")
    assert proof["moved"] == []
    assert len(proof["sha256"]) > 5
    lines = (checkout.root / "metrics/train/plots/metrics/train/loss.tsv").read_text().splitlines()
    steps = [line.split("\t") for line in lines[1:]]
    assert [int(step) for step, _ in steps] == [1, 2, 3, 4]
    assert float(steps[-1][1]) < float(steps[0][1])


def test_a_second_run_does_nothing_and_is_quick(checkout):
    checkout.run("dvc", "status")
    started = processor_seconds()
    again = checkout.run("dvc", "repro")
    assert ran(again) == []
    assert "up to date" in again.stdout
    assert processor_seconds() - started < 10  # `make bench` has the real figure; this only guards against re-hashing
    assert checkout.run("git", "status", "--porcelain").stdout == ""


def test_an_added_type_runs_its_own_items_and_the_evaluation_only(checkout):
    checkout.set({"quantize.types": ["Q8_0", "Q4_K_M", "Q4_0"]})
    assert sorted(ran(checkout.run("dvc", "repro"))) == [
        "card",
        "evaluate",
        "generate_quantized@Q4_0",
        "judge",
        "quantize@Q4_0",
    ]
    assert "Q4_0" in checkout.json("metrics/evaluate/validation.json")


def test_a_type_taken_off_the_list_leaves_nothing_behind(checkout):
    checkout.set({"quantize.types": ["Q8_0", "Q4_K_M"]})
    # Evaluation takes away what is left of the type; then the card is that of the first run, from DVC's run cache.
    assert ran(checkout.run("dvc", "repro")) == ["judge", "evaluate"]
    assert not (checkout.root / "models/gguf/Q4_0.gguf").exists()
    assert "Q4_0" not in (checkout.root / "models/gguf/README.md").read_text()
    assert not (checkout.root / "data/generated/Q4_0").exists()
    assert checkout.run("git", "diff", "--stat", "--", "metrics/evaluate").stdout == ""
    assert ran(checkout.run("dvc", "repro")) == []


def test_tasks_are_measured_without_training_or_answering_again(checkout):
    checkout.set({"benchmark.tasks": ["paragraphs"], "benchmark.limit": 2})
    asked = [f"benchmark@paragraphs-{artifact}" for artifact in ("base", "merged")]
    asked += [f"benchmark_quantized@paragraphs-{artifact}" for artifact in ("Q4_K_M", "Q8_0")]
    assert sorted(ran(checkout.run("dvc", "repro"))) == [*asked, "card", "evaluate"]
    report = checkout.json("metrics/evaluate/benchmark.json")["paragraphs"]
    assert list(report) == ["base", "merged", "Q8_0", "Q4_K_M"]
    assert {delta["to"] for delta in report["Q8_0"]["deltas"]} == {"base", "merged"}
    assert "### paragraphs (2 documents)" in (checkout.root / "models/gguf/README.md").read_text()
    checkout.set({"benchmark.tasks": [], "benchmark.limit": None})
    # Evaluation takes away what is left of the task; then the card is that of the first run, from DVC's run cache.
    assert ran(checkout.run("dvc", "repro")) == ["evaluate"]
    assert checkout.run("git", "status", "--porcelain", "--", "metrics/evaluate", "metrics/benchmark").stdout == ""
    assert [path.name for path in (checkout.root / "data/benchmark").iterdir()] == ["README.md"]
    assert ran(checkout.run("dvc", "repro")) == []


def test_an_edited_local_file_is_fetched_again(checkout):
    file = checkout.root / "data/local/few.jsonl"
    lines = file.read_text().splitlines()
    edited = [lines[0].replace('"ask": "', '"ask": "please, '), *lines[1:]]
    file.unlink()  # the file is a link into DVC's cache
    file.write_text("\n".join(edited) + "\n")
    checkout.run("dvc", "add", "--quiet", "data/local/few.jsonl")
    again = ran(checkout.run("dvc", "repro"))
    expected = ["local_files@dataset", "fetch@dataset", "preprocess", "train"]
    assert [name for name in again if name != "estimate"][:4] == expected
    assert not {"fetch@model", "local_files@model"} & set(again)
    checkout.commit()


def test_another_local_file_runs_nothing_but_the_look_at_the_files(checkout):
    for name in ("data/local/other.jsonl", "models/local/other/config.json"):
        (checkout.root / name).parent.mkdir(exist_ok=True)
        (checkout.root / name).write_text("{}\n")
    looked = {"local_files@dataset", "local_files@model", "local_files_encoder"}
    assert set(ran(checkout.run("dvc", "repro"))) == looked
    assert checkout.run("git", "diff", "--stat", "--", "metrics/fetch", "metrics/local_files").stdout == ""
    (checkout.root / "data/local/other.jsonl").unlink()
    shutil.rmtree(checkout.root / "models/local/other")
    assert set(ran(checkout.run("dvc", "repro"))) <= looked
    assert checkout.run("git", "diff", "--stat", "--", "dvc.lock").stdout == ""


def test_an_experiment_with_another_rate_runs_training_and_what_follows(checkout):
    done = checkout.run("dvc", "exp", "run", "--name", "slower", "-S", "training.learning_rate=5e-5")
    names = ran(done)
    assert names[0] == "train"
    assert not {name for name in names if name.startswith(("fetch", "preprocess", "convert_base", "generate@base"))}
    shown = checkout.run("dvc", "exp", "show", "--csv").stdout.splitlines()
    assert any("slower" in line and "5e-05" in line for line in shown)
    assert "gates_passed" in shown[0]
    assert re.search(r"eval\.loss +\d", checkout.run("dvc", "metrics", "diff").stdout)
    checkout.run("git", "checkout", "--quiet", ".")
    checkout.run("dvc", "checkout", "--quiet")


def test_parameters_that_were_run_before_are_not_run_again(checkout):
    """There and back: all comes from DVC's run cache but the judge, whose verdicts persist."""
    before = output_hashes(checkout)
    ref = checkout.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/slower").stdout.strip()
    checkout.set({"training.learning_rate": 5e-5})
    there = checkout.run("dvc", "repro")
    assert ran(there) == ["judge"]
    assert {"train", "merge", "quantize@Q8_0", "generate@merged", "evaluate", "card"} <= set(cached(there))
    made = yaml.safe_load(checkout.run("git", "show", f"{ref}:dvc.lock").stdout)
    assert yaml.safe_load((checkout.root / "dvc.lock").read_text()) == made
    checkout.set({"training.learning_rate": SMALL["training.learning_rate"]})
    assert ran(checkout.run("dvc", "repro")) == ["judge"]
    assert output_hashes(checkout) == before
    assert checkout.run("dvc", "status").stdout == "Data and pipelines are up to date.\n"
    experiment = checkout.run("dvc", "exp", "run", "--temp", "--name", "again", "-S", "training.learning_rate=5e-5")
    assert ran(experiment) == ["judge"]
    assert "train" in cached(experiment)
    checkout.run("git", "checkout", "--quiet", ".")


def test_a_temporary_experiment_runs_its_own_code_and_leaves_the_workspace_alone(checkout):
    """The changed code exists only in the experiment's checkout; the workspace's is put back while nothing runs."""
    script = checkout.root / "stages/evaluate.py"
    original = script.read_text()
    head = "def main(config: Config) -> None:\n"
    script.write_text(original.replace(head, f"{head}    print('ran', paths.__file__)\n"))
    done = checkout.run("dvc", "exp", "run", "--temp", "--name", "elsewhere")
    assert ran(done) == ["evaluate"]
    assert re.search(r"ran .*/\.dvc/tmp/exps/.*/src/lathe/common/paths\.py", done.stdout)
    script.write_text(original)
    assert checkout.run("git", "status", "--porcelain").stdout == ""


def test_the_table_of_experiments_has_no_column_that_does_not_matter(checkout):
    """Parameters and dependencies are DVC's to show; of the metrics only what is read for is in columns."""
    shown = json.loads(checkout.run("dvc", "exp", "show", "--json").stdout)[0]["data"]["metrics"]
    columns = [key for file in shown.values() for key in dotted_keys.flatten(file["data"])]
    assert len(columns) <= 45  # reports are metrics, or DVC's run cache would keep no run of their stages
    for noise in ("deltas", "intervals", "items", "train.grad_norm", "seconds"):
        assert not [column for column in columns if noise in column], noise
    changed = checkout.run("dvc", "exp", "show", "--only-changed", "--csv").stdout.splitlines()[0].split(",")
    assert "train.loss" in changed
    assert len(changed) <= 60


def test_outputs_are_pushed_to_the_local_remote_and_come_back(checkout):
    checkout.run("dvc", "push")
    (checkout.root / "models/gguf/Q8_0.gguf").unlink()
    checkout.run("rm", "-rf", ".dvc/cache")
    checkout.run("dvc", "pull", "models/gguf/Q8_0.gguf")
    assert (checkout.root / "models/gguf/Q8_0.gguf").stat().st_size > 1000


def test_the_plots_are_drawn(checkout):
    checkout.run("dvc", "plots", "show")
    page = (checkout.root / "dvc_plots/index.html").read_text()
    assert "Loss" in page
    for title in ("Token lengths", "Rows read", "Score by artifact", "Size against score"):
        assert page.count(f'"title": "{title}"') == 1, title
