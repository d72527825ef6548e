"""What a search file may say, how trials are told to DVC, and how they are shared among drivers, DVC left out."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from toy import PYTHONPATH, load_toy

from lathe.common import paths
from lathe.config.params import Params
from lathe.experiments.search import (
    command,
    environment,
    results,
    run_search,
    samplers,
    search_file,
    storage,
    study,
    trial,
)
from lathe.experiments.tracking.run_files import Context

FILE = """\
study: some
sampler: {sampler}
startup_trials: 2
seed: 7
n_trials: 12
timeout_seconds: null
objectives:
  - metric: Q4_K_M.exact_match
    direction: maximize
space:
  {space}
"""
RATE = "training.learning_rate: {type: float, low: 0.001, high: 0.01, log: true}"


@pytest.fixture(scope="module")
def params() -> Params:
    return load_toy().params


def read(folder: Path, params: Params, text: str) -> search_file.Plan:
    file = folder / "some.yaml"
    file.write_text(text)
    return search_file.read_plan(file, params.model_dump(), "some.yaml")


def planned(folder: Path, params: Params, *space: str, sampler: str = "tpe") -> search_file.Plan:
    return read(folder, params, FILE.format(sampler=sampler, space="\n  ".join(space)))


@pytest.mark.parametrize("file", sorted((paths.ROOT / "experiments/search").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_search_that_comes_along_can_be_run(file, params):
    plan = search_file.read_plan(file, params.model_dump(), file.name)
    plan.check(params, file.name)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("trainin.learning_rate: {type: float, low: 0.1, high: 0.2}", "did you mean 'training'?"),
        ("training.lerning_rate: {type: float, low: 0.1, high: 0.2}", "did you mean 'learning_rate'?"),
        (
            "dpo.learning_rate: {type: float, low: 0.1, high: 2}",
            "dpo.learning_rate is 2.0; must be less than or equal to 1",
        ),
        ("lora.r: {type: int, low: 0, high: 8}", "lora.r is 0; must be greater than or equal to 1"),
        ("lora.r: {type: float, low: 1.5, high: 8}", "lora.r is 1.5; must be integer"),
        ("lora.r: {type: int, low: 8, high: 4}", "space.lora.r: low is 8 and high 4; low must be below high"),
        ("lora.lora_dropout: {type: float, low: 0, high: 0.5, log: true}", "must be above 0 where log is true"),
        ("lora.r: {type: int, low: 4, high: 8, log: true, step: 2}", "step does not go with log"),
        ("lora.r: {type: int, low: 4, high: 8, step: 9}", "more than high - low"),
        ("lora.r: {type: int, low: 4, hihg: 8}", "space.lora.r.hihg is not a known key; did you mean 'high'?"),
        ("lora.r: {type: whole, low: 4, high: 8}", "type must be one of float, int, categorical"),
        ("lora.r: {low: 4, high: 8}", "type must be one of float, int, categorical"),
        ("quantize.types: {type: categorical, choices: [[Q4_K_N]]}", "'Q4_K_N' is no quantization type; did you mean"),
        ("quantize.types: {type: categorical, choices: [[Q8_0], [Q8_0]]}", "twice; name each choice once"),
        ("training.optim: {type: categorical, choices: [adamw]}", "training.optim is 'adamw'; must be one of"),
    ],
)
def test_a_wrong_space_is_refused_with_file_and_line(tmp_path, params, space, message):
    with refused("invalid-search-file", message) as caught:
        planned(tmp_path, params, RATE, space)
    lines = str(caught.value).splitlines()
    assert any(re.match(r"some.yaml:12: ", line) and message in line for line in lines), lines
    assert not any("some.yaml:11" in line for line in lines)


def test_all_problems_of_a_file_are_told_at_once(tmp_path, params):
    text = FILE.format(sampler="bayes", space=RATE).replace("direction: maximize", "direction: up")
    with refused("invalid-search-file", "bayes", "up") as caught:
        read(tmp_path, params, text)
    lines = str(caught.value).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["some.yaml:2:", "some.yaml:9:"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("Q4_K_M.exact_mach", "names exact_mach, which is not computed"),
        ("Q5_0.exact_match", "names Q5_0, which is no artifact"),
        ("Q4_K_M.bert_score", "add bert_score to evaluate.metrics"),
    ],
)
def test_an_objective_that_no_trial_would_have_is_refused(tmp_path, params, metric, message):
    plan = read(tmp_path, params, FILE.format(sampler="tpe", space=RATE).replace("Q4_K_M.exact_match", metric))
    with refused("unknown-objective", message):
        plan.check(params, "some.yaml")


def test_an_objective_must_be_there_for_every_choice_of_types(tmp_path, params):
    plan = planned(tmp_path, params, "quantize.types: {type: categorical, choices: [[Q4_K_M], [Q8_0]]}")
    with refused("unknown-objective", "names Q4_K_M, which is no artifact"):
        plan.check(params, "some.yaml")


def test_of_several_types_the_worst_score_counts():
    report = {"Q8_0": {"exact_match": 0.9, "bytes": 9}, "Q2_K": {"exact_match": 0.4, "bytes": 3}}
    most = search_file.Objective(metric="quantized.exact_match", direction="maximize")
    least = search_file.Objective(metric="quantized.bytes", direction="minimize")
    assert most.read_score(report, ["Q8_0", "Q2_K"]) == 0.4
    assert least.read_score(report, ["Q8_0", "Q2_K"]) == 9
    with pytest.raises(ValueError, match=r"has no Q8_0\.kl"):
        search_file.Objective(metric="Q8_0.kl", direction="minimize").read_score(report, ["Q8_0"])


def test_the_environment_becomes_overrides_that_are_recorded(params):
    told = {"LORA_N_TRIALS": "12", "LORA_MODEL_NAME": "tiny", "LORA_LEARNING_RATE": "2e-4", "LORA_NUM_EPOCHS": "3"}
    found = environment.read_environment({**told, "LORA_R": "8"}, params.model_dump(), ["tiny"])
    assert found.overrides == ["model=tiny", "training.num_train_epochs=3", "training.learning_rate=0.0002"]
    assert found.n_trials == 12
    assert found.variables == told
    assert environment.read_environment({}, params.model_dump(), ["tiny"]) == environment.Environment({}, [], None)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("LORA_N_TRIALS", ("", "0", "-1", "2.5", "many", "1e3", "٣")),
        ("LORA_MODEL_NAME", ("", " ", "tinny", "tiny,base")),
        ("LORA_NUM_EPOCHS", ("", "0", "-1", "many", "nan", "inf")),
        ("LORA_BATCH_SIZE", ("", "0", "-4", "2.5", "8 ", "[8]")),
        ("LORA_LEARNING_RATE", ("", "0", "7", "1e999", "5e", "1e-4,5e-5")),
    ],
)
def test_a_variable_that_its_parameter_cannot_be_is_refused_in_one_line(params, name, texts):
    for text in texts:
        with refused("invalid-variable", name) as caught:
            environment.read_environment({name: text}, params.model_dump(), ["tiny"])
        assert re.match(rf"{name}( is empty; |( is|: \S+ is) .*; must be )", str(caught.value))
        assert "\n" not in str(caught.value), text


def test_a_grid_has_each_point_once(tmp_path, params):
    plan = planned(
        tmp_path,
        params,
        "lora.r: {type: int, low: 4, high: 12, step: 4}",
        "lora.lora_dropout: {type: float, low: 0.0, high: 0.3, step: 0.1}",
        "quantize.types: {type: categorical, choices: [[Q8_0], [Q4_K_M]]}",
        sampler="grid",
    )
    points = [json.dumps(samplers.choose_grid_point(plan, number)) for number in range(plan.grid_size)]
    assert len(points) == len(set(points)) == 3 * 4 * 2
    with refused("invalid-search-file", "some.yaml:11: space.training.learning_rate: a grid needs points"):
        planned(tmp_path, params, RATE, sampler="grid")
    with refused("invalid-search-file", "some.yaml:10: the grid has 1,000,000 points", "100,000"):
        planned(tmp_path, params, "lora.r: {type: int, low: 1, high: 1000000}", sampler="grid")


LOG = """\
Running stage 'train':
> exec python3 stages/train.py
INFO lathe: 3 rows
error: training.max_length is 8; no row fits
ERROR: failed to reproduce 'train': failed to run: exec python3 stages/train.py, exited with 2
"""


def test_a_failure_is_told_by_its_stage_and_its_last_error():
    assert trial.explain_failure(LOG, 255) == "train: error: training.max_length is 8; no row fits"
    missing = "ERROR: failed to reproduce 'generate@base': [Errno 2] No such file or directory: 'data/none.txt'"
    assert trial.explain_failure(missing, 255) == "generate@base: [Errno 2] No such file or directory: 'data/none.txt'"
    raised = "Traceback (most recent call last):\n  File\ntorch.OutOfMemoryError: CUDA out of memory\n"
    assert trial.explain_failure(raised, 1) == "torch.OutOfMemoryError: CUDA out of memory"
    assert trial.explain_failure("", 3) == "ended with 3 and printed nothing"
    assert not trial.was_killed(LOG, 255)
    assert trial.was_killed("", -9)
    assert trial.was_killed("ERROR: failed to run: exec python3 x, exited with -9", 255)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:se@cret@host:5432/db", "postgresql://me@host:5432/db"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
    ],
)
def test_a_password_is_never_shown(url, shown):
    assert storage.hide_password(url) == shown


def test_a_database_that_is_away_is_told_in_one_line_without_its_password():
    with refused("no-database", kept=False) as caught:
        storage.open_storage("postgresql://me:secret@127.0.0.1:1/db", "some")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("postgresql://me@127.0.0.1:1/db: ")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A place for studies that is not the checkout's."""
    monkeypatch.setattr(storage, "JOURNALS", tmp_path / "journals")
    monkeypatch.setattr(paths, "SCRATCH", tmp_path / "scratch")
    return tmp_path


def opened(plan: search_file.Plan, params: Params, setting: dict[str, Any] | None = None) -> study.Study:
    found = study.Study(plan, storage.open_storage(None, plan.study), params.model_dump(), is_local=True)
    found.check_setting(setting or {})
    return found


def test_a_line_that_a_kill_cut_short_does_not_spoil_the_journal(kept, params):
    plan = planned(kept, params, RATE)
    first = opened(plan, params)
    begun = first.take_trial(2, may_begin=True)
    with (kept / "journals/some.journal").open("ab") as journal:
        journal.write(b'{"op_code":5,"worker_id":"x"')
    first.finish(begun, [0.5], "c0ffee")
    assert opened(plan, params).count_finished() == 1


@pytest.mark.parametrize(
    "damage", [b"\n", b'{"op_code":5,"work\n', b"\0\0\0\0\n", b"[]\n", b'{"op_code":99}\n', b"\xff\xfe\n"]
)
def test_a_damaged_journal_is_refused_with_its_line_and_left_as_it_is(kept, params, damage):
    plan = planned(kept, params, RATE)
    opened(plan, params).take_trial(2, may_begin=True)
    journal = kept / "journals/some.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for at in (1, len(lines)):
        journal.write_bytes(b"".join([*lines[: at - 1], damage, *lines[at:]]))
        before = journal.read_bytes()
        with refused("damaged-journal", f"some.journal:{at}: "):
            opened(plan, params)
        assert journal.read_bytes() == before


def test_a_trial_of_a_driver_that_was_killed_goes_on_with_its_number_and_parameters(kept, params):
    plan = planned(kept, params, RATE, "lora.r: {type: int, low: 4, high: 64}")
    context = multiprocessing.get_context("fork")

    def begin_and_die() -> None:
        driver = opened(plan, params)
        begun = [driver.take_trial(3, may_begin=True) for _ in range(2)]
        driver.choose_values(begun[1])
        os._exit(9)

    process = context.Process(target=begin_and_die)
    process.start()
    process.join()
    left = opened(plan, params)
    before = left.trials()[1].params
    driver = opened(plan, params)
    taken = [driver.take_trial(3, may_begin=True) for _ in range(3)]
    assert [one.number for one in taken] == [0, 1, 2]
    assert driver.choose_values(taken[1]) == before
    assert driver.take_trial(3, may_begin=True) is None
    assert left.take_trial(3, may_begin=True) is None, "the driver lives"


def test_who_runs_a_trial_that_another_has_ended_stops_it(kept, params):
    plan = planned(kept, params, RATE)
    cut_off, other = opened(plan, params), opened(plan, params)
    begun = cut_off.take_trial(1, may_begin=True)
    other._me = {**other._me, "machine": "another"}
    assert other._take_over(other.trials()[0]) is not None
    cut_off.choose_values(begun)
    assert cut_off.finish(begun, [0.5], "c0ffee")  # back before the other has come to an end
    assert other.send_heartbeat() == [0]
    assert other.list_experiments() == ["c0ffee"]


def test_who_has_lost_a_trial_stops_it_and_what_the_other_recorded_stands(kept, params):
    plan = planned(kept, params, RATE)
    slow, other = opened(plan, params), opened(plan, params)
    begun = slow.take_trial(1, may_begin=True)
    other._me = {**other._me, "machine": "another"}
    taken = other._take_over(other.trials()[0])
    assert other.send_heartbeat() == []
    assert slow.send_heartbeat() == [0]
    other.choose_values(taken)
    assert other.finish(taken, [0.5], "c0ffee")
    assert not slow.finish(begun, [0.1], "decaf")
    slow.fail(begun, "too late")
    [trial] = slow.trials()
    assert (trial.values, trial.user_attrs["experiment"]) == ([0.5], "c0ffee")
    assert slow._take_over(trial) is None


def test_drivers_at_once_share_the_trials_and_repeat_no_point(kept, params):
    plan = planned(kept, params, RATE, sampler="random")
    context = multiprocessing.get_context("fork")

    def drive() -> None:
        driver = opened(plan, params)
        while (begun := driver.take_trial(12, may_begin=True)) is not None:
            driver.finish(begun, [driver.choose_values(begun)["training.learning_rate"]], "c0ffee")

    drivers = [context.Process(target=drive) for _ in range(3)]
    for process in drivers:
        process.start()
    for process in drivers:
        process.join()
    trials = opened(plan, params).optuna_study.get_trials()
    assert [one.state.name for one in trials] == ["COMPLETE"] * 12
    assert len({one.values[0] for one in trials}) == 12


def test_a_search_begins_with_the_parameters_as_they_are_and_is_the_same_each_time(kept, params):
    plan = planned(kept, params, RATE)
    found = []
    for _ in range(2):
        driver = opened(plan, params)
        for _ in range(6):
            begun = driver.take_trial(6, may_begin=True)
            driver.finish(begun, [-abs(driver.choose_values(begun)["training.learning_rate"] - 0.004)], "c0ffee")
        found.append([one.params["training.learning_rate"] for one in driver.trials()])
        (kept / "journals/some.journal").unlink()
    assert found[0] == found[1]
    assert found[0][0] == params.training.learning_rate
    assert len(set(found[0])) == 6


def test_a_study_is_not_gone_on_with_when_its_scores_could_not_be_compared(kept, params):
    plan = planned(kept, params, RATE)
    opened(plan, params, {"parameters": {"seed": 42}, "files": {"src/lathe": "a"}})
    opened(plan, params, {"parameters": {"seed": 42}, "files": {"src/lathe": "a"}})
    with refused("other-setting", "study some: ", "other parameters: seed 42, now 43", "go back to that"):
        opened(plan, params, {"parameters": {"seed": 43}, "files": {"src/lathe": "a"}})
    with refused("other-setting", 'other files: src/lathe "a", now "b"'):
        opened(plan, params, {"parameters": {"seed": 42}, "files": {"src/lathe": "b"}})


MEMORY = """
import subprocess, sys
from types import SimpleNamespace
from pathlib import Path
sys.path.insert(0, {tests!r})
from lathe.common import paths
from lathe.experiments.search import run_search, storage, study, trial
from test_search import RATE, opened, planned
from toy import load_toy
import psutil
folder, trials = Path(sys.argv[1]), int(sys.argv[2])
storage.JOURNALS, paths.SCRATCH, run_search.LOGS = folder / "j", folder / "s", folder
run_search.SECONDS_BETWEEN_LOOKS = run_search.SECONDS_BETWEEN_SEARCHES_FOR_WORK = 0
experiments = {{}}
report = {{name: {{"exact_match": 0.5}} for name in ("merged", "Q4_K_M")}}
trial.find_experiment = lambda order: experiments.get(order.name)
def start(order, gpu):
    experiments[order.name] = SimpleNamespace(commit="c", read_json=lambda file: report)
    return SimpleNamespace(poll=lambda: 0, wait=lambda: 0, terminate=lambda: None)
params = load_toy().params
plan = planned(folder, params, RATE, sampler="random")
driver = run_search.Driver(opened(plan, params), trials, 2, None, [], [], "", "", start)
used = []
class Progress:
    def add(self, count): used.append(psutil.Process().memory_info().rss)
    def __init__(self, *a, **k): pass
    def __enter__(self): return self
    def __exit__(self, *a): pass
run_search.Progress = Progress
driver.run()
print(used[len(used) // 4], used[-1])
"""


def test_memory_does_not_grow_with_trials(tmp_path):
    """Beside what Optuna keeps of a trial, some kilobytes."""
    program = MEMORY.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "200"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "LATHE_LOG_LEVEL": "ERROR"},
    )
    early, late = map(int, done.stdout.split())
    assert late - early < 150 * 20_000, (early, late)


def test_what_a_search_found_is_written_with_pictures(kept, params):
    plan = planned(kept, params, RATE, "lora.r: {type: int, low: 4, high: 64}", sampler="random")
    driver = opened(plan, params, {"overrides": {"seed": "1"}})
    for number in range(8):
        begun = driver.take_trial(8, may_begin=True)
        values = driver.choose_values(begun)
        if number == 3:
            driver.fail(begun, "train: error: no")
        else:
            driver.finish(begun, [values["training.learning_rate"]], "c0ffee")
    results.write_results(driver, kept / "found")
    found = json.loads((kept / "found/study.json").read_text())
    scores = [one["scores"].get("Q4_K_M.exact_match") for one in found["trials"]]
    assert [one["state"] for one in found["trials"]].count("complete") == 7
    assert found["trials"][3]["reason"] == "train: error: no"
    assert found["best"] == [f"some-{scores.index(max(one for one in scores if one is not None))}"]
    assert found["importance"]["training.learning_rate"] > found["importance"]["lora.r"]
    for picture in ("history", "importance"):
        assert (kept / f"found/{picture}.png").read_bytes().startswith(b"\x89PNG")
    rows = (kept / "found/course.tsv").read_text().splitlines()
    assert rows[0] == "trial\tbest"
    assert [float(row.split("\t")[1]) for row in rows[1:]] == sorted(float(row.split("\t")[1]) for row in rows[1:])


def test_a_study_in_which_every_trial_failed_is_an_error_with_the_reason(kept, params, capsys):
    driver = opened(planned(kept, params, RATE), params)
    for reason in ("train: error: no", "train: error: too long"):
        driver.fail(driver.take_trial(2, may_begin=True), reason)
    with refused("all-trials-failed", "study some", "train: error: too long"):
        command._print_best(driver)
    assert capsys.readouterr().out == "2 trials ended, 2 of them failed\n"


def test_of_several_objectives_the_best_are_a_front_of_which_one_must_be_named(kept, params):
    text = FILE.format(sampler="random", space=RATE).replace(
        "space:", "  - metric: Q4_K_M.bytes\n    direction: minimize\nspace:"
    )
    plan = read(kept, params, text)
    driver = opened(plan, params, {"overrides": {}, "objectives": plan.directions})
    for scores in ([0.9, 800.0], [0.7, 500.0], [0.5, 900.0], [0.6, 600.0]):
        begun = driver.take_trial(4, may_begin=True)
        driver.choose_values(begun)
        driver.finish(begun, scores, "c0ffee")
    results.write_results(driver, kept / "found")
    assert json.loads((kept / "found/study.json").read_text())["best"] == ["some-0", "some-1"]
    assert (kept / "found/pareto.png").read_bytes().startswith(b"\x89PNG")
    with refused("several-best", "2 experiments are best", "some-0: 0.9, 800; some-1: 0.7, 500", "name one"):
        results.apply_best(driver, None)
    with refused("no-such-experiment", "--apply some-9"):
        results.apply_best(driver, "some-9")
    with refused("experiment-elsewhere", "--apply some-1", "`dvc exp pull REMOTE some-1`"):
        results.apply_best(driver, "some-1")


def test_each_trial_at_once_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert run_search.list_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_search.list_gpus() == []


def test_the_process_of_a_trial_knows_what_it_is_and_nothing_of_what_is_the_searchs_own(kept, monkeypatch):
    monkeypatch.setattr(run_search, "LOGS", kept)
    says_all = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    monkeypatch.setattr(trial.Order, "build_command", lambda order: says_all)
    monkeypatch.setenv(storage.VARIABLE, "postgresql://me:secret@host/db")
    monkeypatch.setenv("LORA_BATCH_SIZE", "4")
    run_search.start_trial(trial.Order("late", 3, "tpe", "some trial", [], "", "", os.getpid()), "5").wait()
    told = json.loads(trial.read_log(kept, "late-3"))
    context = Context.from_environment(told)
    assert (context.study, context.trial, context.sampler) == ("late", "3", "tpe")
    assert told["CUDA_VISIBLE_DEVICES"] == "5"
    assert not {storage.VARIABLE, "LORA_BATCH_SIZE"} & set(told)
