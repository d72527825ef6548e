"""What the report reads and how it writes it; tests/service looks at the page in a browser."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import report_run
from refusals import refused

from lathe.reports import experiment_table, facts, page, plots, text_diff
from lathe.reports.values import Value, read_value

NO_EXPERIMENTS = experiment_table.Experiments([], [], [])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the pipeline left, of thirty rows a split; to be copied."""
    root = tmp_path_factory.mktemp("built")
    report_run.build(root, rows=30)
    return root


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(built, tmp_path / "run"))


def gathered(root: Path, metric: str = "exact_match") -> facts.ReportFacts:
    return facts.gather_facts(root, seed=42, primary_metric=metric)


def rendered(root: Path) -> str:
    return page.render_page(gathered(root), NO_EXPERIMENTS)


def test_a_value_knows_its_place_whatever_the_names_on_the_way(tmp_path):
    gate = "Q4_K_M.exact_match >= a/b~c"
    (tmp_path / "x.json").write_text(json.dumps({"gates": {gate: {"margin": 0.5}}}))
    value = read_value(tmp_path, "x.json").get("gates", gate, "margin")
    assert value.content == 0.5
    assert value.address == "x.json#/gates/Q4_K_M.exact_match%20%3E%3D%20a~1b~0c/margin"
    assert value.get("more") is None
    assert read_value(tmp_path, "y.json") is None


def test_a_file_that_is_not_json_is_named_in_one_line(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with refused("not-json", "x.json:1: ", "run the stage that writes it again") as caught:
        read_value(tmp_path, "x.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (0.978, "share", "97.8 %"),
        (0.978, "percent", "97.8"),
        (1347.344, "number", "1,347"),
        (1.0064, "number", "1.006"),
        (0.0000413, "number", "4.1e-5"),
        (0.000198, "number", "0.0002"),
        (0, "number", "0"),
        (890976, "bytes", "0.89 MB"),
        (79000, "bytes", "79.00 kB"),
        (101806080, "bytes", "101.81 MB"),
        (5_400_000_000, "bytes", "5.40 GB"),
        (12, "bytes", "12 B"),
        (41.25, "seconds", "41.2 s"),
        (138.68, "seconds", "2.3 min"),
        (8100, "seconds", "2.2 h"),
        (0.0004, "p", "< 0.001"),
        (0.739, "p", "0.74"),
        (0.80037, "fine", "0.8004"),
    ],
)
def test_numbers_are_rounded_and_have_their_unit(value, style, text):
    assert page.format_value(value, style) == text


def test_the_best_file_is_named_by_validation_and_the_headline_is_of_test(run):
    [validation] = json.loads((run / "metrics/evaluate/validation.json").read_text())
    for name in ("Q8_0", "Q4_K_M", "Q4_1", "merged"):
        validation[name]["exact_match"] = {"Q4_1": 0.9, "merged": 1.0}.get(name, 0.8)
    report_run.write_json(run / "metrics/evaluate/validation.json", [validation])
    found = gathered(run)
    assert found.best == "Q4_1"
    assert found.headline[0] == "test"


def test_the_same_seed_draws_the_same_rows_and_another_one_others(run):
    rows = [sample.row for sample in gathered(run).samples]
    assert rows == [sample.row for sample in gathered(run).samples]
    assert len(rows) == len(set(rows)) == facts.SAMPLED_ROWS
    assert rows != [sample.row for sample in facts.gather_facts(run, seed=7, primary_metric="exact_match").samples]


def test_answers_that_are_equal_stand_together_and_the_reference_first(run):
    for name, completion in zip(report_run.ARTIFACTS, ("x", "x", "right", "right", "right ", "x"), strict=True):
        row = {"prompt": "p", "reference": "right", "completion": completion, "finish_reason": "stop"}
        row["finish_reason"] = "length" if name == "Q4_1" else "stop"
        report_run.write_lines(run / f"data/generated/{name}/validation.jsonl", [row])
    [sample] = gathered(run).samples
    found = [(answer.artifacts, answer.text, answer.is_reference, answer.cut) for answer in sample.answers]
    assert found == [
        (["merged", "Q8_0"], "right", True, False),
        (["base", "base_few_shot"], "x", False, False),
        (["Q4_K_M"], "right ", False, False),
        (["Q4_1"], "x", False, True),
    ]
    assert sample.differs


def test_a_row_that_only_the_untrained_model_got_wrong_does_not_differ(run):
    for name in report_run.ARTIFACTS:
        row = {"prompt": "p", "reference": "y", "completion": "x" if "base" in name else "y", "finish_reason": "stop"}
        report_run.write_lines(run / f"data/generated/{name}/validation.jsonl", [row])
    [sample] = gathered(run).samples
    assert not sample.differs
    assert sample.request == gathered(run).requests[0]


def test_worst_rows_keep_their_order_and_leave_out_what_is_the_reference(run):
    rows = read_value(run, "data/scored/base_few_shot/validation.jsonl").content
    wrong = [row["row"] for row in rows if row["completion"] != row["reference"]]
    assert [row.content["row"] for row in gathered(run).worst["base_few_shot"]] == wrong[: facts.WORST_ROWS]


def test_what_the_judge_said_stands_beside_the_worst_rows(run, tmp_path):
    assert gathered(run).reasons == {}
    report_run.build(tmp_path / "judged", rows=30, judged=True)
    assert "Something else is asked of the house." in rendered(tmp_path / "judged")


def test_pairs_are_shown_with_their_win_rates_and_without_any_there_is_no_such_part(run):
    assert "Pairwise judge" not in rendered(run)
    interval = {"value": 0.62, "low": 0.55, "high": 0.7}
    counted = {"rows": 40, "same_answers": 4, "wins": 20, "ties": 10, "losses": 10, "consistent": 0.9}
    rates = {"win_rate": interval, "length_controlled_win_rate": interval, "position_bias": {**interval, "low": None}}
    content = {
        "validation": {},
        "test": {"merged": {**counted, **rates}, "base": {**counted, **rates, "position_bias": None}},
    }
    report_run.write_json(run / "metrics/evaluate/pairwise.json", [content])
    assert "Pairwise judge" in rendered(run)
    assert 'data-source="metrics/evaluate/pairwise.json#/0/test/merged/win_rate/value"' in rendered(run)


def test_tasks_are_shown_with_their_differences_and_without_any_there_is_no_such_part(run):
    assert "Tasks of lm-evaluation-harness" not in rendered(run)
    own = {"documents": 40, "bytes": 1, "lower_is_better": ["word_perplexity"]}
    delta = {"to": "base", "low": 5.0, "high": 12.0, "p": 0.001, "detectable": 3.0}
    base = {"acc": 0.75, "word_perplexity": 90.0, **own, "intervals": [], "deltas": []}
    merged = {
        "acc": 0.7,
        "word_perplexity": 98.5,
        **own,
        "intervals": [{"metric": "acc", "low": 0.55, "high": 0.8}],
        "deltas": [
            {**delta, "metric": "word_perplexity", "delta": 8.5},
            {**delta, "metric": "acc", "delta": -0.05, "low": -0.1, "high": 0.01, "p": 0.2},
        ],
    }
    report = [{"own_task": {"base": base, "merged": merged}}]
    report_run.write_json(run / "metrics/evaluate/benchmark.json", report)
    part = rendered(run).partition('<section id="tasks"')[2].partition("</section>")[0]
    assert "own_task" in part
    assert 'data-source="metrics/evaluate/benchmark.json#/0/own_task/merged/acc" data-style="share">70.0' in part
    assert 'class="worse"' in part, "a higher perplexity"
    assert 'class="better"' not in part
    assert ">40</data> documents" in part


def test_sampled_answers_have_a_part_of_their_own(run):
    assert "Sampled answers" not in rendered(run)
    merged = {
        "exact_match": 0.61,
        "exact_match_pass_at_8": 0.8,
        "bytes": 1000,
        "intervals": [{"metric": "exact_match", "low": 0.55, "high": 0.66}],
        "deltas": [],
        "samples": 8,
        "spread": [{"metric": "exact_match", "deviation": 0.021}],
    }
    report_run.write_json(run / "metrics/evaluate/samples.json", [{"validation": {}, "test": {"merged": merged}}])
    part = rendered(run).partition('<section id="sampled"')[2].partition("</section>")[0]
    assert "exact match, pass at 8" in part
    source = 'data-source="metrics/evaluate/samples.json#/0/test/merged'
    assert f'{source}/exact_match_pass_at_8" data-style="share">80.0' in part
    assert f'{source}/spread/0/deviation" data-style="share">2.1' in part
    assert "Validation" not in part


def test_each_dataset_of_a_mixture_is_shown_with_its_rows_scores_and_origin(run):
    assert "of the mixture" not in rendered(run)
    file = run / "metrics/preprocess/report.json"
    report = json.loads(file.read_text())
    names = {"support": "messages", "prose": "text"}
    counts = {"read": 100, "dropped": 2, "validation": 9, "test": 8}
    report["columns"] = [{"dataset": name, "format": form, "detected": True} for name, form in names.items()]
    report["datasets"] = [
        {"dataset": name, **counts, "train": 81, "share_of_train": share}
        for name, share in zip(names, (0.95, 0.05), strict=True)
    ]
    report_run.write_json(file, report)
    scores = {"exact_match": 0.5, "bytes": 1, "intervals": [], "deltas": []}
    parts = {name: {"base": scores, "merged": {**scores, "exact_match": 0.75}} for name in names}
    report_run.write_json(run / "metrics/evaluate/datasets.json", [{"validation": {}, "test": parts}])
    origins = [{"name": name, "source": "local", "sha256": "ab" * 32} for name in names]
    origin = {"origin": [{"name": "mixed", "source": "mixture", "datasets": origins}]}
    report_run.write_json(run / "metrics/fetch/dataset.json", origin)
    shown = rendered(run)
    assert 'data-source="metrics/preprocess/report.json#/datasets/1/share_of_train" data-style="share">5.0' in shown
    assert "of 2 datasets" in shown
    assert "<code data-quote>text</code>" in shown
    assert 'data-source="metrics/evaluate/datasets.json#/0/test/prose/merged/exact_match"' in shown
    assert "Each dataset of the mixture on test" in shown
    assert "Each dataset of the mixture on validation" not in shown
    assert shown.count("<dt>dataset of the mixture</dt>") == 2


def test_metrics_that_are_not_those_of_the_lock_are_named(run):
    assert gathered(run).stale == []
    file = run / "metrics/evaluate/test.json"
    file.write_text(file.read_text().replace("0.41", "0.42"))
    assert gathered(run).stale == ["metrics/evaluate/test.json"]
    assert "metrics/evaluate/test.json</code>" in rendered(run).partition('class="warning"')[2]


def test_parameters_are_those_of_the_training_and_only_those_that_applied(run):
    names = [name for name, _ in gathered(run).parameters]
    assert {"lora.r", "quantization.bnb_4bit_quant_type", "seed"} <= set(names)
    lock = (run / "dvc.lock").read_text()
    lock = lock.replace("tuning: lora", "tuning: full").replace("load_in_4bit: true", "load_in_4bit: false")
    (run / "dvc.lock").write_text(lock)
    names = [name for name, _ in gathered(run).parameters]
    assert "quantization.load_in_4bit" in names
    assert not {"lora.r", "quantization.bnb_4bit_quant_type"} & set(names)


PARTS = {
    "metrics/evaluate": "There are no scores",
    "metrics/evaluate/gates.json": "There are no gates",
    "metrics/train": "There are no curves",
    "metrics/preprocess": "There is no data report",
    "metrics/timings": "No stage has been timed",
    "metrics/estimate": "There is no estimate",
    "metrics/fetch": "A pipeline that has not run whole",
    "metrics/generate": "95 % interval",
    "data/generated": "There are no answers to show",
    "data/scored": "There are no scored rows",
    "data/processed": "user\n",
    "dvc.lock": "Nothing is recorded",
    "dvc.yaml": "Time and memory",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_leaves_one_sentence(run, part):
    path = run / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert PARTS[part] in rendered(run)


def test_a_part_that_is_there_leaves_no_such_sentence(run):
    html = rendered(run)
    for part in ("metrics/evaluate", "metrics/train", "data/generated", "data/scored", "dvc.lock"):
        assert PARTS[part] not in html


def test_one_file_alone_is_enough_for_a_page(tmp_path):
    report_run.write_json(tmp_path / "metrics/fetch/model.json", {"origin": [{"name": "tiny", "source": "builtin"}]})
    assert rendered(tmp_path).count('class="absent"') == 14


def test_where_nothing_was_measured_the_remedy_is_named(tmp_path):
    with refused("nothing-measured", f"{tmp_path}/metrics", "`make repro`"):
        gathered(tmp_path)


@pytest.mark.parametrize("names", [("base",), ("merged",), ("base", "merged"), ("base", "merged", "Q8_0")])
def test_few_artifacts_make_a_page_too(run, names):
    for split in report_run.SPLITS:
        file = run / f"metrics/evaluate/{split}.json"
        [report] = json.loads(file.read_text())
        report_run.write_json(file, [{name: report[name] for name in names}])
    assert gathered(run).best == {1: names[-1] if names == ("merged",) else None, 2: "merged", 3: "Q8_0"}[len(names)]
    rendered(run)


def test_a_score_that_does_not_apply_is_a_dash_and_one_that_never_does_is_no_column(run):
    for split in report_run.SPLITS:
        file = run / f"metrics/evaluate/{split}.json"
        [report] = json.loads(file.read_text())
        for scores in report.values():
            scores["json_valid"] = None
            scores["intervals"] = [each for each in scores["intervals"] if each["metric"] != "json_valid"]
            scores["deltas"] = [each for each in scores["deltas"] if each["metric"] != "json_valid"]
        report["base"]["rouge_l"] = None
        report_run.write_json(file, [report])
    found = gathered(run).splits["test"]
    assert "json_valid" not in found.metrics
    assert "valid JSON" not in rendered(run).partition('id="worst"')[0]
    assert found.score("base", "rouge_l") is None
    assert "rouge_l" in found.metrics


def test_a_primary_metric_that_nothing_has_leaves_the_summary_out(run):
    html = page.render_page(gathered(run, "judge"), NO_EXPERIMENTS)
    assert "No file has a score by <code>judge</code>" in html


def test_an_axis_holds_all_values_and_its_ticks_say_where_they_are():
    chance = random.Random(1)
    for _ in range(300):
        middle, spread = 10 ** chance.uniform(-6, 9), 10 ** chance.uniform(-3, 2)
        values = [middle * (1 + spread * chance.random()) for _ in range(chance.randint(1, 5))]
        unit = chance.choice([1, 0.01, 1e6])
        axis = plots.create_axis(values, 46, 348, unit=unit, may_be_log=chance.random() < 0.5)
        assert all(46 <= axis.place(value) <= 348 for value in values)
        assert len(axis.ticks) >= 1
        for value, text in axis.ticks:
            assert math.isclose(float(text.replace(",", "")) * unit, value, rel_tol=1e-6, abs_tol=1e-12), (values, axis)


def test_labels_of_crowded_points_hide_neither_one_another_nor_leave_the_plot():
    table = Value([[890_000 + 9000 * n, 0.95 + 0.002 * (n % 3)] for n in range(9)], "x.json")
    points = [plots.Point(f"Q{n}_K_M", row.get(0), row.get(1)) for n, row in enumerate(table)]
    x = plots.create_x_axis([point.x.content for point in points])
    drawn = plots.draw_scatter("Score", points, x, x_label="bytes", y_label="")
    boxes = [plots._measure_label(mark.label, plots.LETTER * 6) for mark in drawn.marks]
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0
        assert right <= plots.WIDTH
        assert all(not (left < b[2] and b[0] < right and top < b[3] and b[1] < bottom) for b in boxes[:number])


def test_a_curve_breaks_where_it_has_no_number_and_long_ones_keep_their_ends():
    steps = [{"step": float(n), "loss": math.nan if 500 <= n < 600 else 1.0 / (n + 1)} for n in range(10_001)]
    drawn = plots.draw_curves(
        "Loss", {"training": list(Value(steps, "l.tsv"))}, x="step", y="loss", x_label="", y_label=""
    )
    [line] = drawn.lines
    assert len(line.paths) == 2
    points = [point for path in line.paths for point in path.split()]
    assert plots.MOST_POINTS / 2 < len(points) <= plots.MOST_POINTS + 1
    assert points[0].startswith(f"{drawn.x.place(0.0)},")
    assert points[-1].startswith(f"{drawn.x.place(10_000.0)},")
    assert line.last.content == 1.0 / 10_001
    nothing = [{"step": 1.0, "loss": math.inf}]
    assert (
        plots.draw_curves("Loss", {"a": list(Value(nothing, "l.tsv"))}, x="step", y="loss", x_label="", y_label="")
        is None
    )


def joined(text: str, reference: str | None = None) -> list[tuple[str, str]]:
    return [(piece.kind, piece.text) for piece in text_diff.split_text(text, reference)]


def test_differences_are_marked_by_words():
    assert joined('{"room":"attic"}', '{"room":"cellar"}') == [
        ("plain", '{"room":"'),
        ("differs", "attic"),
        ("plain", '"}'),
    ]
    assert ("missing", ',"delay":10') in joined('{"room":"attic"}', '{"room":"attic","delay":10}')
    assert joined("nothing alike here", '{"a":1}') == [("plain", "nothing alike here")]


def test_what_cannot_be_seen_is_named():
    assert joined("a\x00b\u202ec\ud800\n\td") == [
        ("plain", "a"),
        ("control", "U+0000"),
        ("plain", "b"),
        ("control", "U+202E"),
        ("plain", "c"),
        ("control", "U+D800"),
        ("plain", "\n\td"),
    ]
    assert joined("👩‍🚀 é नमस्ते") == [("plain", "👩‍🚀 é नमस्ते")]


def test_long_texts_are_cut_and_compared_in_bounded_time():
    shown = joined("ab " * 100_000, "cd " * 100_000)
    assert shown[-1] == ("control", "… 296,000 more characters")
    assert sum(len(text) for kind, text in shown if kind != "control") == text_diff.LONGEST


def test_experiments_show_what_changed_and_what_failed():
    def state(name, rate, score, error=None):
        metrics = {"v.json": {"data": {"merged": {"exact_match": score}}}}
        params = {"params.yaml": {"data": {"seed": 1, "training": {"learning_rate": rate}, "types": ["Q8_0"]}}}
        data = {"params": params, "metrics": metrics} if score is not None else None
        return {"rev": "abcdef0123", "name": name, "data": data, "error": error}

    def group(state, executor=None):
        return {"revs": [state], "executor": executor, "name": None}

    failed = state("broken", 0.1, None, {"type": "X", "msg": "it broke"})
    queued = {**state(None, 0.2, 0.1), "name": "later"}
    groups = [group(state("low", 0.001, 0.5)), group(failed), group(queued, {"state": "queued"})]
    listed = [
        {**state("workspace", 9, 9), "experiments": None},
        {**state("main", 0.006, 0.9), "experiments": groups},
        {**state(None, 0.006, 0.8), "experiments": None},
    ]
    wanted = {"merged": ("v.json", "merged", "exact_match"), "no": ("w.json", "x")}
    found = experiment_table.build_table(Value(listed, experiment_table.SOURCE), wanted)
    assert [(row.name, row.state) for row in found.rows] == [
        ("main", None),
        ("low", None),
        ("broken", "it broke"),
        ("later", "queued"),
    ]
    assert "training.learning_rate" in found.parameters
    assert found.metrics == ["merged"]
    assert found.rows[1].metrics["merged"].address == (
        "dvc%20exp%20show%20--json#/1/experiments/0/revs/0/data/metrics/v.json/data/merged/exact_match"
    )


def test_where_dvc_cannot_be_asked_the_page_says_why(tmp_path):
    found = experiment_table.read_experiments(tmp_path, {})
    assert found.rows == []
    assert found.problem.startswith("`dvc exp show` gave none: ")


def searched(root: Path, name: str, objectives: list[str], scores: list[list[float] | None], best: list[int]) -> None:
    """What a search leaves."""
    study = {
        "study": name,
        "objectives": [{"metric": metric, "direction": "maximize"} for metric in objectives],
        "overrides": {"training.max_steps": "30"},
        "best": [f"{name}-{number}" for number in best],
        "importance": {"lora.r": 1.0} if len(scores) > 3 else {},
        "trials": [
            {
                "experiment": f"{name}-{number}",
                "parameters": {"lora.r": 4 * number},
                "scores": dict(zip(objectives, values, strict=True)) if values else {},
                "reason": None if values else "train: error: <b>no</b>",
            }
            for number, values in enumerate(scores)
        ],
    }
    report_run.write_json(root / f"metrics/search/{name}/study.json", study)
    if len(objectives) == 1:
        so_far = [max(row[0] for row in scores[: at + 1] if row) for at in range(len(scores)) if scores[at]]
        rows = [{"trial": at, "best": height} for at, height in enumerate(so_far)]
        report_run.write_table(root / f"metrics/search/{name}/course.tsv", rows, "\t")


def test_a_search_is_shown_with_its_trials_the_best_first(run):
    searched(run, "rate", ["merged.exact_match"], [[0.25], None, [0.75], [0.5]], [2])
    searched(run, "size", ["Q4_K_M.exact_match", "Q4_K_M.bytes"], [[0.9, 800.0], [0.7, 500.0], [0.5, 900.0]], [0, 1])
    html = rendered(run)
    section = html[html.index('<section id="search"') : html.index('<section id="time"')]
    assert section.index("rate-2") < section.index("rate-0") < section.index("rate-1")
    assert "&lt;b&gt;no" in section
    assert "<b>no" not in section
    assert "training.max_steps=30" in section
    assert 'data-source="metrics/search/rate/study.json#/trials/2/scores/merged.exact_match"' in section
    assert 'data-points="metrics/search/rate/course.tsv"' in section
    assert section.count("data-x-source") == 2, "the Pareto front"
    assert section.count("PED-ANOVA") == 1, "of the study with enough trials"
    assert 'data-source="metrics/search/rate/study.json#/importance/lora.r"' in section


def test_the_engines_that_answered_are_named_where_one_is_not_llama_cpp(run):
    assert "Answered by" not in rendered(run)
    for split in ("validation", "test"):
        file = run / f"metrics/evaluate/{split}.json"
        [report] = json.loads(file.read_text())
        report["merged"]["engine"] = "server (vllm)"
        file.write_text(json.dumps([report]))
    html = rendered(run)
    assert html.count("Answered by") == 2
    assert "server (vllm) for merged" in html
    assert '<th scope="col">engine' not in html
