"""Recipes, sweeps and DVC's commands around them, on a small checkout whose pipeline has run."""

import re
import sys
import time
from pathlib import Path

import pytest
from conftest import Checkout, copy_of

# Changes that only `evaluate` and what follows it can see: runs of seconds.
RECIPE = """\
description: The small run, scored with fewer resamples.
hypothesis: The scores stay the same.
expect: Some seconds.
overrides:
  evaluate.bootstrap_samples: 200
"""

UPSTREAM = ("fetch", "preprocess", "train", "merge")


@pytest.fixture(scope="module")
def checkout(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with a recipe; each test leaves it as it was committed."""
    checkout = copy_of(reproduced, tmp_path_factory.mktemp("experiments") / "lathe")
    (checkout.root / "experiments/few.yaml").write_text(RECIPE)
    checkout.commit()
    return checkout


def lathe(checkout: Checkout, *arguments: str, check: bool = True):
    environment = {"PYTHONPATH": str(checkout.root / "src")}
    return checkout.run(sys.executable, "-m", "lathe", *arguments, check=check, env=environment)


def ran(printed: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", printed)


def state(checkout: Checkout) -> tuple[str, str, str, dict[str, str]]:
    """What a user would notice of the workspace: Git's and DVC's status, what is staged, and every tracked text."""
    names = checkout.run("git", "ls-files").stdout.split()
    texts = {name: (checkout.root / name).read_bytes().hex() for name in names if (checkout.root / name).is_file()}
    staged = checkout.run("git", "ls-files", "--stage").stdout
    return checkout.run("git", "status", "--porcelain").stdout, checkout.run("dvc", "status").stdout, staged, texts


def queue_to_its_end(checkout: Checkout, names: list[str], jobs: int, seconds: float) -> str:
    """Start the queue and wait until every experiment has run; return what they printed."""
    checkout.run("dvc", "queue", "start", "--jobs", str(jobs))
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        status = checkout.run("dvc", "queue", "status").stdout
        if len(re.findall(r"Success|Failed", status)) >= len(names):  # one may be between the queue and its worker
            break
        time.sleep(1)
    logs = "".join(checkout.run("dvc", "queue", "logs", name).stdout for name in names)
    assert len(re.findall(r"Success", status)) == len(names), f"{status}\n{logs}"
    checkout.run("dvc", "queue", "stop")
    checkout.run("dvc", "queue", "remove", "--success")  # the tasks alone: another sweep has the same names
    return logs


def test_a_sweep_through_the_queue_makes_an_experiment_of_each_and_leaves_the_workspace_as_it_was(checkout):
    before = state(checkout)
    queued = lathe(checkout, "run", "few", "-S", "evaluate.bootstrap_samples=200,300", "-S", "seed=42", "--queue")
    said = "few: 1 value is not as in params.yaml:\n  evaluate.bootstrap_samples: 1000 -> 200, 300\n"
    assert queued.stderr.startswith(said)
    again = lathe(checkout, "run", "few", "-S", "evaluate.bootstrap_samples=200,300", "--queue", check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: few-1, few-2: already in the queue; `dvc queue remove few-1 few-2`")
    # What is changed from here on is not theirs: they run the code that they were queued with.
    script = checkout.root / "stages/evaluate.py"
    original = script.read_text()
    script.write_text("raise SystemExit('the code of the workspace')\n")
    logs = queue_to_its_end(checkout, ["few-1", "few-2"], jobs=2, seconds=240)
    script.write_text(original)
    assert sorted(ran(logs)) == ["card", "card", "evaluate", "evaluate"]
    assert state(checkout) == before
    listed = lathe(checkout, "experiments").stdout
    for name in ("few-1", "few-2"):
        assert re.search(rf"{name} \([0-9a-f]{{10}}\): exact_match 0 \[0, 0\] on validation, Q\w+", listed)
    shown = checkout.run("dvc", "exp", "show", "--csv").stdout
    assert "few-1" in shown
    assert "few-2" in shown
    compared = lathe(checkout, "compare", "few-1", "few-2").stdout
    assert re.search(r"evaluate.bootstrap_samples +200 +300", compared)
    assert compared.splitlines()[-1].startswith("By exact_match on validation: few-2 gives the same answers as few-1")


def test_a_recipe_runs_under_its_name_once_and_again_only_by_force(checkout):
    first = lathe(checkout, "run", "few", "--temp")
    assert ran(first.stdout)[:1] in (["evaluate"], [])  # from the run cache where the sweep has run it already
    assert not [stage for stage in ran(first.stdout) if stage.startswith(UPSTREAM)]
    second = lathe(checkout, "run", "few", "--temp", check=False)
    assert second.returncode == 2
    assert re.fullmatch(
        r"error: few \([0-9a-f]{10}\): has been run from this commit; "
        r"--name NAME for another beside it, --force in its place\n",
        second.stderr,
    )
    lathe(checkout, "run", "few", "-S", "evaluate.bootstrap_samples=200", "--name", "few-7", "--temp")
    assert re.search(r"few-7 \(\w{10}\): exact_match", lathe(checkout, "experiments").stdout)
    forced = lathe(checkout, "run", "few", "--temp", "--force")
    [ref, commit] = re.findall(r"`git update-ref (\S+) (\w+)` brings it back", forced.stderr)[0]
    checkout.run("git", "cat-file", "-e", commit)
    checkout.run("git", "rev-parse", "--verify", ref)
    assert checkout.run("git", "status", "--porcelain").stdout == ""


def test_wrong_parameters_and_names_are_refused_before_dvc_starts(checkout):
    for arguments, message in {
        ("fwe",): "error: fwe: no such recipe in experiments/; did you mean 'few'?",
        ("few", "-S", "lora.r=0"): "error: params.yaml: lora.r is 0; must be greater than or equal to 1",
        ("few", "-S", "seed=1,x", "--queue"): "error: params.yaml: seed is 'x'; must be integer",
        ("few", "-S", "seed=1,2"): "error: -S seed=1,2: that is a sweep of 2 runs; add --queue",
        ("few", "--queue", "--temp"): "error: --queue and --temp: take one of them; ",
    }.items():
        done = lathe(checkout, "run", *arguments, check=False)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith(message), done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_an_experiment_is_applied_branched_and_shown_against_the_commit(checkout):
    lathe(checkout, "run", "few", "-S", "evaluate.metrics=[exact_match,token_f1]", "--temp", "--force")
    checkout.run("dvc", "exp", "branch", "few", "kept")
    checkout.run("dvc", "exp", "apply", "few")
    assert "token_f1" in lathe(checkout, "metrics", "few").stdout
    assert "bootstrap_samples" in checkout.run("dvc", "params", "diff").stdout
    checkout.run("dvc", "plots", "diff", "HEAD", "few", "--out", "dvc_plots")
    assert "Score by artifact" in (checkout.root / "dvc_plots/index.html").read_text()
    assert "bootstrap_samples: 200" in checkout.run("git", "show", "kept:params.yaml").stdout
    assert "kept" in lathe(checkout, "compare", "main", "kept").stdout
    for how in ([], ["--temp"], ["--queue"]):
        refused = lathe(checkout, "run", "few", "--name", "beside", *how, check=False)
        assert refused.returncode == 2
        first, *listed = refused.stderr.splitlines()
        assert first.startswith("error: few: params.yaml is not as committed in 1 key that the recipe does not set; ")
        assert "--keep" in first
        assert "`lathe reset`" in first
        assert [line.split(" -> ")[0] for line in listed] == [
            'error:   evaluate.metrics: ["exact_match", "json_valid", "json_fields", "rouge_l"]'
        ]
    kept = lathe(checkout, "run", "few", "--name", "beside", "--keep")
    assert "token_f1" in checkout.run("git", "show", f"{commit_of(checkout, 'beside')}:params.yaml").stdout
    assert kept.stderr.startswith("beside: every value is as in params.yaml\n")
    lathe(checkout, "reset", "--yes")


def test_a_reset_brings_back_what_a_run_changed_and_touches_nothing_else(checkout):
    root, before = checkout.root, state(checkout)
    lathe(checkout, "run", "few", "-S", "evaluate.metrics=[exact_match,token_f1]", "--force")
    mine = {"notes.txt": "mine\n", "metrics/mine.json": "{}\n", "data/local/other.jsonl": "{}\n"}
    for name, text in mine.items():
        (root / name).write_text(text)
    checkout.run("git", "add", "metrics/mine.json")
    rows = root / "data/local/few.jsonl"
    original = rows.read_bytes()
    rows.unlink()  # the file is a link into the cache, which copies of this checkout share
    rows.write_bytes(original + b"{}\n")
    readme = root / "README.md"
    readme.write_text(readme.read_text() + "\nmine\n")

    asked = lathe(checkout, "reset", check=False)
    assert asked.returncode == 2
    assert "  evaluate.metrics: [" in asked.stdout
    assert "dvc.lock" in asked.stdout
    assert "data/scored" in asked.stdout
    assert asked.stderr.startswith("error: lathe reset: asks, and there is no terminal to answer on; give --yes")
    assert "token_f1" in (root / "params.yaml").read_text()

    done = lathe(checkout, "reset", "--yes")
    assert done.stdout.startswith(asked.stdout)
    for name, text in mine.items():
        assert (root / name).read_text() == text
        (root / name).unlink()
    assert rows.read_bytes() == original + b"{}\n"
    assert readme.read_text().endswith("\nmine\n")
    rows.write_bytes(original)
    checkout.run("git", "reset", "--quiet", "--", "metrics/mine.json")
    checkout.run("git", "restore", "README.md")
    assert state(checkout) == before
    assert lathe(checkout, "reset").stdout.startswith("nothing to put back to commit ")


def test_a_reset_removes_what_a_run_of_another_type_and_method_has_written(checkout):
    root, before = checkout.root, state(checkout)
    lathe(checkout, "run", "few", "-S", "quantize.types=[Q8_0,Q4_1]", "--name", "types", "--force")
    assert not (root / "models/gguf/Q4_K_M.gguf").exists()
    written = [root / "models/gguf/Q4_1.gguf", root / "metrics/quantize/Q4_1.json", root / "metrics/generate/Q4_1.json"]
    assert all(file.is_file() for file in written)
    rewards = root / "metrics/train/plots/metrics/eval/reward.tsv"  # as a killed training by rewards leaves it
    rewards.write_text("step\treward\n")
    done = lathe(checkout, "reset", "--yes").stdout
    [removed] = [line for line in done.splitlines() if line.startswith("removed: ")]
    names = {"data/generated/Q4_1", *(str(file.relative_to(root)) for file in (*written, rewards))}
    assert names <= set(removed.removeprefix("removed: ").split(" and ")[0].split(", "))
    assert not any(file.exists() for file in (*written, rewards))
    assert (root / "models/gguf/Q4_K_M.gguf").is_file()
    assert state(checkout) == before
    assert "Data and pipelines are up to date" in checkout.run("dvc", "status").stdout


def test_outputs_that_the_cache_has_lost_are_left_as_they_are_and_named(checkout, tmp_path):
    checkout = copy_of(checkout, tmp_path / "lathe")
    lathe(checkout, "run", "few", "-S", "evaluate.metrics=[exact_match,token_f1]", "--name", "lost")
    lock = checkout.run("git", "show", "HEAD:dvc.lock").stdout
    md5 = re.search(r"path: data/scored\n +hash: md5\n +md5: (\w{2})(\S+)", lock)
    (checkout.root / ".dvc/cache/files/md5" / md5[1] / md5[2]).unlink()
    scored = sorted((checkout.root / "data/scored").rglob("*.jsonl"))
    texts = [file.read_bytes() for file in scored]
    said = lathe(checkout, "reset", "--yes").stdout
    assert "not in DVC's cache, so left as they are (`dvc pull` may bring them): data/scored" in said
    assert [file.read_bytes() for file in scored] == texts
    assert "token_f1" not in (checkout.root / "params.yaml").read_text()


def test_the_preflight_says_what_goes_along_and_what_stays_behind_as_it_then_does(checkout):
    """What it says is what a temporary experiment then finds in its own checkout."""
    root = checkout.root
    clean = lathe(checkout, "preflight")
    assert clean.stdout == "nothing: queued and temporary experiments are made of the last commit\n"
    new = {
        "rewards/mine.py": "left out, though a stage may read it",
        "models/local/other/config.json": "left out, though a stage may read it",
        "notes.txt": "left out, unknown to Git",
        "staged.txt": "included, though not committed",
    }
    for name in new:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("here\n")
    checkout.run("git", "add", "staged.txt")
    script = root / "stages/evaluate.py"
    original = script.read_text()
    here = [*new, "data/local/few.jsonl"]
    probe = f"    print('FOUND', [name for name in {here} if (paths.ROOT / name).exists()])\n"
    script.write_text(original.replace("(config: Config) -> None:\n", f"(config: Config) -> None:\n{probe}"))
    checkout.set({"evaluate.bootstrap_samples": 400})

    said = lathe(checkout, "preflight", check=False)
    assert said.returncode == 1
    lines = dict(line.split(": ", 1) for line in said.stdout.splitlines() if ": " in line)
    for name, kind in new.items():
        assert name.removesuffix("config.json") in lines[next(key for key in lines if key.startswith(kind))]
    assert "stages/evaluate.py" in lines["included, though not committed"]
    assert lines["  evaluate.bootstrap_samples"] == "1000 -> 400"

    checkout.run("git", "add", "params.yaml")
    checkout.set({"evaluate.bootstrap_samples": 500})
    before = state(checkout)
    assert "MM params.yaml" in before[0]
    done = checkout.run("dvc", "exp", "run", "--temp", "--name", "probe")
    assert state(checkout) == before
    assert "bootstrap_samples: 500" in checkout.run("git", "show", f"{commit_of(checkout, 'probe')}:params.yaml").stdout
    assert "FOUND ['staged.txt', 'data/local/few.jsonl']" in done.stdout
    checkout.run("git", "reset", "--quiet", "--hard")
    checkout.run("git", "clean", "--quiet", "--force", "-d", "rewards", "models/local", "notes.txt")


@pytest.mark.slow
def test_a_sweep_of_trainings_shares_what_they_have_in_common(checkout):
    """Two rates by two ranks, two at a time: data and base once, and next to nothing beside their own outputs."""
    before = state(checkout)
    held = cache_bytes(checkout.root)
    names = [f"few-{number}" for number in range(1, 5)]
    sweep = ["-S", "training.learning_rate=5e-5,1e-3", "-S", "lora.r=4,8"]
    lathe(checkout, "run", "few", *sweep, "--queue", "--force")
    logs = queue_to_its_end(checkout, names, jobs=2, seconds=1200)
    stages = ran(logs)
    assert stages.count("train") == 4
    assert not [stage for stage in stages if stage.startswith(("fetch", "preprocess"))]
    assert state(checkout) == before
    shared, own = outputs(checkout, "HEAD"), {}
    for name in names:
        own |= outputs(checkout, commit_of(checkout, name))
    added = sum(size for md5, size in own.items() if md5 not in shared)
    assert cache_bytes(checkout.root) - held < added + 20_000_000
    assert list((checkout.root / ".dvc/tmp/exps").rglob("*.safetensors")) == []


def outputs(checkout: Checkout, commit: str) -> dict[str, int]:
    """The bytes of every output of a commit by its hash."""
    lock = checkout.run("git", "show", f"{commit}:dvc.lock").stdout
    return {md5: int(size) for md5, size in re.findall(r"md5: ([0-9a-f]{32}(?:\.dir)?)\n      size: (\d+)", lock)}


def cache_bytes(root: Path) -> int:
    files = {(file.stat().st_ino, file.stat().st_size) for file in (root / ".dvc/cache").rglob("*") if file.is_file()}
    return sum(size for _, size in files)


def commit_of(checkout: Checkout, name: str) -> str:
    refs = checkout.run("git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").stdout
    return next(line.split()[0] for line in refs.splitlines() if line.endswith(f"/{name}"))
