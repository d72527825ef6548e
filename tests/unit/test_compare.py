"""Experiments held against one another: what was changed, what came of it on the same rows, and what may be said of it.

In a repository with commits and experiments as the pipeline leaves them, answers of 40 rows in DVC's cache.
"""

import json
import shutil
import statistics
from pathlib import Path

import pytest
from experiment_repository import ROWS, Repository, copy_repository
from refusals import refused

from lathe.common import paths
from lathe.evaluation.judge.judged_pairs import read_other_answers
from lathe.experiments import compare, comparison
from lathe.provenance import revisions


def some(count: int) -> list[bool]:
    return [row < count for row in range(ROWS)]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("untouched"))


@pytest.fixture
def repository(untouched: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    repository = copy_repository(untouched, tmp_path / "repository")
    monkeypatch.setattr(paths, "ROOT", repository.root)
    return repository


def compared(*names: str, split: str = "validation", artifact: str | None = None) -> comparison.Comparison:
    return comparison.compare(names, split=split, artifact=artifact)


def test_what_gets_clearly_more_rows_right_is_called_better_and_by_how_much(repository):
    repository.run("one", some(10))
    repository.run("two", some(30), {"training.learning_rate": 0.001})
    found = compared("one", "two")
    assert found.parameters == {"training.learning_rate": [0.006, 0.001]}
    assert [side.scores["exact_match"] for side in found.sides] == [0.25, 0.75]
    [difference] = [each for each in found.differences if each.metric == "exact_match"]
    assert (difference.delta, difference.rows) == (0.5, ROWS)
    assert difference.low is not None
    assert 0.3 < difference.low < 0.5
    assert difference.p < 0.01
    assert found.warnings == []
    assert found.verdict == (
        f"By exact_match on validation: two is better than one (+0.5, p {difference.p:.2g}, 20 of 40 answers the same)."
    )
    assert "one is worse than two (-0.5" in compared("two", "one").verdict


def test_scores_of_two_engines_are_compared_only_if_that_is_asked_for(repository, capsys):
    repository.run("one", some(10))
    repository.run("two", some(30), engine="server (vllm)")
    repository.run("three", some(20), engine="server (vllm)")
    with refused("mixed-engines", "llama.cpp for one; server (vllm) for two", "lathe compare --mixed-engines"):
        compared("one", "two")
    compare.run(["one", "two"], split="validation", artifact=None, as_json=False, mixed_engines=True)
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("engine ")]
    assert line.split(maxsplit=2)[1:] == ["llama.cpp", "server (vllm)"]
    assert "differences are of engines as well as of weights" in printed
    alike = compared("two", "three")
    assert [side.engine for side in alike.sides] == ["server (vllm)"] * 2
    assert not [warning for warning in alike.warnings if "engine" in warning]
    repository.run("asking", some(10), {"evaluate.allow_mixed_engines": True})
    assert [warning for warning in compared("asking", "two").warnings if "different engines answered" in warning]


def test_tasks_are_compared_on_their_documents_beside_the_answers(repository, capsys):
    repository.run("one", some(20), chosen=some(10))
    repository.run("two", some(20), {"lora.r": 8}, chosen=some(30))
    found = compared("one", "two")
    assert [side.scores["choice.acc"] for side in found.sides] == [0.25, 0.75]
    assert found.sides[0].intervals["choice.acc"] == (0.15, 0.35)
    [difference] = [each for each in found.differences if each.metric == "choice.acc"]
    assert (difference.delta, difference.rows, difference.same_answers) == (0.5, ROWS, 20)
    assert difference.p < 0.01
    assert found.verdict.startswith("By exact_match on validation: two gives the same answers as one")
    compare.run(["one", "two"], split="validation", artifact=None, as_json=False)
    assert "two choice.acc" in capsys.readouterr().out
    assert "choice.acc" not in compared("one", "two", artifact="base_few_shot").sides[0].scores
    repository.run("three", some(20), {"lora.r": 16})
    assert {each.metric for each in compared("one", "three").differences}.isdisjoint({"choice.acc"})


def test_a_difference_that_chance_may_have_made_is_not_called_one(repository):
    repository.run("one", some(20))
    repository.run("two", some(21), {"lora.lora_dropout": 0.1})
    assert (
        "two is not shown to differ from one (+0.025, p 1, 39 of 40 answers the same, a difference of 0.19 would show)"
        in compared("one", "two").verdict
    )


def test_the_same_answers_are_told_from_others_that_score_the_same(repository):
    repository.run("one", some(20))
    repository.run("two", some(20), {"lora.lora_dropout": 0.1})
    repository.run("three", some(20)[::-1], {"lora.lora_dropout": 0.2})
    verdict = compared("one", "two", "three").verdict
    assert "two gives the same answers as one (all 40 rows, to the letter)" in verdict
    assert "three scores the same as one (+0, p 1, 0 of 40 answers the same); p adjusted for 2 comparisons." in verdict


def test_less_is_better_where_the_score_is_a_perplexity(repository):
    lower = {"evaluate.primary_metric": "perplexity"}
    repository.run("one", some(5), lower)
    repository.run("two", some(35), {**lower, "seed": 42, "training.learning_rate": 0.001})
    verdict = compared("one", "two").verdict
    assert verdict.startswith("By perplexity on validation: two is better than one (-")


def test_of_several_differences_one_must_be_clearer_than_of_one_alone(repository):
    repository.run("one", some(20))
    repository.run("two", some(26), {"lora.r": 8})
    assert "two is better than one (+0.15, p 0.02" in compared("one", "two").verdict
    for number in range(3):
        repository.run(f"other-{number}", some(20), {"lora.r": 32 + number})
    found = compared("one", "two", "other-0", "other-1", "other-2")
    assert "two is not shown to differ from one (+0.15, p 0.1" in found.verdict


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"lora.r": 8, "training.learning_rate": 0.001}, "2 factors differ"),
        ({"lora.r": 8, "lora.lora_alpha": 16}, None),
        ({"lora.r": 8, "lora.lora_alpha": 32}, None),
        ({"lora.r": 8, "lora.lora_alpha": 64}, "2 factors differ"),
        ({"training.tuning": "full", "quantization.load_in_4bit": False}, None),
        ({"model": "qwen3-600m"}, None),
        ({"model": "qwen3-600m", "dataset": "gsm8k"}, "2 factors differ"),
        ({"lora.r": 8, "grpo.epsilon": 0.1}, None),
        ({"training.method": "grpo", "grpo.epsilon": 0.1}, "2 factors differ"),
    ],
)
def test_more_than_one_changed_factor_is_warned_of(repository, changes, factors):
    repository.run("one", some(20))
    repository.run("two", some(20), changes)
    warnings = [warning for warning in compared("one", "two").warnings if "factor" in warning]
    assert [warning[: len(factors or "")] for warning in warnings] == ([factors] if factors else [])


def test_changed_code_and_another_way_of_scoring_are_warned_of(repository):
    repository.run("one", some(20))
    repository.run("two", some(20), {"evaluate.normalize": "text"}, code="1" * 32)
    warnings = "\n".join(compared("one", "two").warnings)
    assert "the code of two and one differs: src/lathe/model.py" in warnings
    assert "two and one were not scored alike (evaluate.normalize)" in warnings


def test_only_rows_that_both_answered_are_compared_whatever_their_order(repository):
    repository.run("one", some(20))
    repository.run("two", some(20)[:30][::-1], {"generate.max_rows": 30}, rows=range(30)[::-1])
    found = compared("one", "two")
    assert {(each.delta, each.rows) for each in found.differences} == {(0.0, 30)}
    assert "one answered 40 validation rows and two 30, 30 of them the same; differences are of these" in found.warnings


def test_nothing_is_tested_where_no_row_is_the_same(repository):
    repository.run("one", some(20))
    repository.run("two", some(30), {"dataset": "gsm8k"}, rows=range(100, 140))
    found = compared("one", "two")
    assert found.differences == []
    assert "0 of them the same; nothing can be tested" in "\n".join(found.warnings)
    assert "two cannot be held against one (0.75 against 0.5): no answers of both to the same row" in found.verdict


def test_without_the_answers_in_the_cache_the_recorded_scores_are_shown_and_nothing_is_tested(repository):
    repository.run("one", some(20))
    repository.run("two", some(30), {"lora.r": 8})
    lost = revisions.find_revision("two").find_output_hash("data/generated/Q8_0")
    (repository.root / ".dvc/cache/files/md5" / lost[:2] / lost[2:]).unlink()
    found = compared("one", "two")
    assert [side.scores["exact_match"] for side in found.sides] == [0.5, 0.75]
    assert found.differences == []
    assert "the answers of two are not in DVC's cache" in "\n".join(found.warnings)


def test_several_seeds_of_one_setting_are_told_as_mean_and_spread(repository):
    counts = {1: 30, 2: 32, 3: 34}
    for seed, count in counts.items():
        repository.run(f"seed-{seed}", some(count), {"seed": seed})
    found = compared(*(f"seed-{seed}" for seed in counts))
    [setting] = found.settings
    scores = [count / ROWS for count in counts.values()]
    assert setting.seeds == [1, 2, 3]
    assert setting.mean["exact_match"] == pytest.approx(statistics.fmean(scores))
    assert setting.spread["exact_match"] == pytest.approx(statistics.stdev(scores))
    assert "3 seeds: exact_match on validation is 0.8 on average, with a standard deviation of 0.05" in found.verdict
    assert "the seeds of seed-2 and seed-1 differ (1 and 2)" in "\n".join(found.warnings)


def test_one_setting_with_one_seed_twice_is_compared_as_any_two_and_has_no_spread(repository):
    repository.run("again", some(0))
    found = compared("main", "again")
    assert found.settings == []
    assert found.verdict == (
        "By exact_match on validation: again gives the same answers as main (all 40 rows, to the letter)."
    )


def test_seeds_are_of_one_setting_whichever_file_was_the_best_of_each_and_that_is_warned_of(repository):
    types = {"quantize.types": ["Q8_0", "Q4_K_M"]}
    for seed, better in ((1, "Q8_0"), (2, "Q4_K_M"), (3, "Q8_0")):
        repository.run(f"seed-{seed}", some(20), {**types, "seed": seed}, better=better)
    found = compared("seed-1", "seed-2", "seed-3")
    assert [side.artifact for side in found.sides] == ["Q8_0", "Q4_K_M", "Q8_0"]
    assert [setting.seeds for setting in found.settings] == [[1, 2, 3]]
    assert (
        "not the same file of each is compared (Q8_0 of seed-1, Q4_K_M of seed-2, Q8_0 of seed-3): "
        "--artifact NAME holds one kind against its own"
    ) in found.warnings
    chosen = compared("seed-1", "seed-2", artifact="merged")
    assert not [warning for warning in chosen.warnings if "not the same file" in warning]


def test_without_any_spread_between_the_seeds_nothing_is_tested(repository):
    for seed in (1, 2):
        repository.run(f"low-{seed}", some(10), {"seed": seed})
        repository.run(f"high-{seed}", some(30), {"seed": seed, "lora.r": 64})
    assert compared("low-1", "low-2", "high-1", "high-2").verdict == (
        "high-1 (2 seeds) against low-1 (2 seeds) by exact_match on validation: "
        "0.75 against 0.25 with every seed; without any spread nothing is tested."
    )


def test_two_settings_with_several_seeds_each_are_held_against_the_spread_of_the_seeds(repository):
    for seed, count, other in ((1, 10, 30), (2, 12, 32), (3, 14, 34)):
        repository.run(f"low-{seed}", some(count), {"seed": seed})
        repository.run(f"high-{seed}", some(other), {"seed": seed, "lora.r": 64})
    found = compared("low-1", "low-2", "low-3", "high-1", "high-2", "high-3")
    assert [setting.names for setting in found.settings] == [
        ["low-1", "low-2", "low-3"],
        ["high-1", "high-2", "high-3"],
    ]
    assert found.verdict.startswith(
        "high-1 (3 seeds) against low-1 (3 seeds) by exact_match on validation: better, 0.8 against 0.3 on average (p "
    )
    repository.run("alone", some(11), {"seed": 1, "lora.r": 8})
    assert "is within the range of the 3 seeds" in compared("low-1", "low-2", "low-3", "alone").verdict


def test_cost_is_that_of_the_stages_and_not_known_where_one_came_from_the_run_cache(repository):
    repository.run("run", some(20), {"lora.r": 8}, training_seconds=33.0, trained="1" * 32)
    repository.run("taken", some(20), {"lora.r": 4}, training_seconds=10.0, trained="2" * 32)
    found = compared("run", "taken")
    assert found.sides[0].cost == {
        "seconds": 35.5,
        "training_seconds": 33.0,
        "peak_memory_bytes": 2000,
        "bytes": 1000,
    }
    assert found.sides[1].cost == {"seconds": None, "training_seconds": None, "peak_memory_bytes": None, "bytes": 1000}
    assert "what taken took is not known" in "\n".join(found.warnings)


def test_timings_that_a_run_left_are_not_those_of_the_next_that_came_from_the_run_cache(repository):
    repository.run("run", some(20), {"lora.r": 8}, training_seconds=33.0, trained="1" * 32)
    repository.run("taken", some(20), {"lora.r": 4}, training_seconds=33.0, trained="2" * 32)
    found = compared("run", "taken")
    assert [side.cost["training_seconds"] for side in found.sides] == [33.0, None]
    assert "what taken took is not known" in "\n".join(found.warnings)


def test_the_file_that_is_compared_and_the_split_can_be_chosen(repository):
    repository.run("one", some(20))
    found = compared("one", "main", split="test", artifact="merged")
    assert [side.artifact for side in found.sides] == ["merged", "merged"]
    assert found.split == "test"
    assert "on test" in found.verdict


def test_a_branch_a_commit_and_the_workspace_are_compared_too_and_nothing_is_checked_out(repository):
    commit = repository.run("one", some(20), {"lora.r": 8})
    before = repository.git("status", "--porcelain"), sorted(repository.root.rglob("[!.]*"))
    found = compared("workspace", "main", commit[:9])
    assert [side.commit for side in found.sides] == [None, repository.base, commit]
    assert (repository.git("status", "--porcelain"), sorted(repository.root.rglob("[!.]*"))) == before


def test_all_of_it_is_printed_and_as_json_too(repository, capsys):
    repository.run("one", some(10))
    repository.run("two", some(30), {"training.learning_rate": 0.001})
    compare.run(["one", "two"], split="validation", artifact=None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["one", "two"]
    assert ["training.learning_rate", "0.006", "0.001"] in [line.split() for line in lines]
    [scores] = [line.split() for line in lines if line.startswith("exact_match")]
    assert scores[1] == "0.25"
    [difference] = [line.split() for line in lines if line.startswith("two exact_match")]
    assert difference[2] == "+0.5"
    assert lines[-1].startswith("By exact_match on validation: two is better than one")
    compare.run(["one", "two"], split="validation", artifact=None, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == lines[-1]
    assert printed["sides"][1]["scores"]["exact_match"] == 0.75


@pytest.mark.parametrize(
    ("names", "code", "part"),
    [
        (["one"], "too-few-names", "compare one: "),
        (["one", "one"], "named-twice", "compare: one is named twice"),
        (["one", "tow"], "no-such-revision", "tow: no such experiment, commit or branch; did you mean 'two'?"),
        (["one", "--all"], "no-such-revision", "--all: no such experiment, commit or branch; "),
        (["one", "empty"], "not-evaluated", "empty: has no metrics/evaluate/validation.json"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(repository, names, code, part):
    repository.run("one", some(20))
    repository.run("two", some(20))
    tree = repository.git("write-tree", "--missing-ok", "--prefix=metrics/")
    repository.git("branch", "empty", repository.git("commit-tree", tree, "-m", "another project"))
    with refused(code, part) as caught:
        compared(*names)
    assert str(caught.value).startswith(part)
    assert "\n" not in str(caught.value)


def test_an_artifact_that_one_of_them_lacks_is_refused_with_the_near_name(repository):
    repository.run("one", some(20))
    with refused("no-such-artifact", "--artifact Q8_1: one has none; did you mean 'Q8_0'"):
        compared("one", "main", artifact="Q8_1")


def test_a_name_of_experiments_on_several_commits_is_refused_unless_one_is_of_the_last(repository):
    repository.run("one", some(20))
    repository.git("commit", "--quiet", "--allow-empty", "--message", "another")
    assert revisions.find_revision("one").commit
    commit = repository.git("rev-parse", "HEAD")
    repository.git("update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/one", commit)
    assert revisions.find_revision("one").commit == commit
    repository.git("commit", "--quiet", "--allow-empty", "--message", "a third")
    with refused("ambiguous-experiment", "one: several experiments have this name", kept=False):
        revisions.find_revision("one")


def test_the_answers_of_another_experiment_can_be_judged_against(repository, tmp_path):
    commit = repository.run("one", some(10))
    others = read_other_answers(tmp_path, ["base", "merged", "Q8_0", "Q2_K"], "one")
    assert others.commit == commit
    assert {artifact for artifact, _ in others.rows} == {"base", "merged", "Q8_0"}
    assert [row["completion"] for row in others.rows["merged", "test"]][9:11] == ["answer 9", "?"]
    shutil.rmtree(repository.root / ".dvc/cache")
    with refused("answers-not-cached", "judge.against is 'one'", "dvc exp pull"):
        read_other_answers(tmp_path, ["base", "merged"], "one")
