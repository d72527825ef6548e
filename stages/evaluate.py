"""Score every artifact's answers with intervals and differences, and evaluate the gates on validation.

reads   data/generated/, metrics/generate/, data/processed/ (a row's dataset of a mixture, and cluster), models/encoder/
        where evaluate.metrics lists bert_score, data/benchmark/, data/sampled/,
        params.yaml: seed, evaluate, bert_score, judge.enabled, judge.mode,
        quantize.types, export.formats, sampling.files, benchmark.tasks, benchmark.cluster_by
writes  metrics/evaluate/{validation,test,gates}.json, metrics/evaluate/summary.json (the columns of `dvc exp show`),
        metrics/evaluate/scores.csv (for the plots), metrics/evaluate/datasets.json (each dataset of a mixture alone),
        metrics/evaluate/pairwise.json (win rates and position bias of a pairwise judge),
        metrics/evaluate/benchmark.json (tasks of benchmark.tasks),
        data/scored/<ARTIFACT>/{validation,test}.jsonl (rows with their own scores, worst first)
removes files of quantization types and of formats that are no longer listed
"""

import logging

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.config import artifacts
from lathe.config.export_params import remove_unlisted_formats
from lathe.config.gates import parse_gate
from lathe.config.load import Config
from lathe.evaluation.gate_results import evaluate_gate, make_metrics

SPLITS = ("validation", "test")

logger = logging.getLogger("lathe.evaluate")


def main(config: Config) -> None:
    from lathe.common.jsonl import write_jsonl
    from lathe.evaluation.benchmark_scores import add_task_scores, evaluate_benchmark, remove_unlisted_tasks
    from lathe.evaluation.clusters import add_clusters
    from lathe.evaluation.evaluate import (
        Resampling,
        add_bert_score,
        define_scores,
        evaluate,
        evaluate_datasets,
        make_plot_rows,
        read_answers,
        read_dataset_names,
        read_general_text,
        score_rows,
    )
    from lathe.evaluation.mixed_engines import check_engines, find_engines, mark_engines
    from lathe.evaluation.pairwise import summarize_pairs, warn_of_bias
    from lathe.evaluation.sampled_scores import evaluate_samples, list_sampled, remove_unlisted_files
    from lathe.evaluation.summary import summarize

    settings, types = config.params.evaluate, config.params.quantize.types
    formats = config.params.export.formats
    names = [*artifacts.list_artifacts(types), *formats]
    tasks, with_tasks = config.params.benchmark.tasks, artifacts.list_benchmarked(types)
    for folder in (paths.METRICS / "generate", paths.METRICS / "quantize", paths.GGUF):
        artifacts.remove_unlisted_types(folder, types)
    for folder in (paths.METRICS / "generate", paths.METRICS / "quantize", paths.MODELS_EXPORTED):
        remove_unlisted_formats(folder, formats)
    for folder in (paths.METRICS / "benchmark", paths.DATA_BENCHMARK):
        remove_unlisted_tasks(folder, with_tasks, tasks)
    for folder in (paths.METRICS / "sample", paths.DATA_SAMPLED):
        remove_unlisted_files(folder, config.params.sampling.files)
    judged = paths.DATA_JUDGED if config.params.judge.enabled else None
    answers = {
        split: read_answers(
            paths.DATA_GENERATED,
            judged,
            names,
            split,
            strip_thinking=settings.strip_thinking,
            pairwise=config.params.judge.mode == "pairwise",
        )
        for split in SPLITS
    }
    engine_of = {split: find_engines(rows) for split, rows in answers.items()}
    for engines in engine_of.values():
        # That an exported model answers by its own runtime is what is measured of it.
        of_files = {name: engine for name, engine in engines.items() if name not in formats}
        if warning := check_engines(of_files, allowed=settings.allow_mixed_engines):
            logger.warning("%s", warning)
    if settings.cluster_by:
        for split in SPLITS:
            add_clusters(answers[split], paths.DATA_PROCESSED / f"{split}.jsonl")
    if "bert_score" in settings.metrics:
        cache = paths.SCRATCH / "bert_score"
        add_bert_score(list(answers.values()), config.params.bert_score, seed=config.params.seed, cache=cache)

    scores = define_scores(
        settings.metrics,
        normalize=settings.normalize,
        answer_pattern=settings.answer_pattern,
        bert_score_weight=settings.bert_score_weight,
        judge_weight=settings.judge_weight if config.params.judge.enabled else None,
        judge_score=config.params.judge.score,
    )
    general, bytes_of = read_general_text(paths.DATA_GENERATED, names), _read_file_sizes(names)
    resampling = Resampling(settings.bootstrap_samples, config.params.seed)
    reports = {split: evaluate(answers[split], general, bytes_of, scores, resampling) for split in SPLITS}
    by_dataset = {
        split: evaluate_datasets(
            answers[split], read_dataset_names(paths.DATA_PROCESSED / f"{split}.jsonl"), bytes_of, scores, resampling
        )
        for split in SPLITS
    }
    pairwise = {
        split: summarize_pairs(rows, samples=resampling.samples, seed=resampling.seed)
        for split, rows in answers.items()
    }
    for split, summaries in pairwise.items():
        warn_of_bias(summaries, split)
    benchmark = evaluate_benchmark(
        paths.DATA_BENCHMARK,
        bytes_of,
        with_tasks,
        tasks,
        cluster_by=config.params.benchmark.cluster_by,
        resampling=resampling,
    )
    sampled = {
        split: evaluate_samples(
            paths.DATA_SAMPLED,
            list_sampled(config.params.sampling.files),
            split,
            rows["base"],
            scores,
            bytes_of,
            resampling,
            strip_thinking=settings.strip_thinking,
        )
        for split, rows in answers.items()
    }
    gates_of = [parse_gate(gate) for gate in settings.gates or []]
    steering = add_task_scores(reports["validation"], benchmark, gates_of)
    outcomes = [evaluate_gate(gate, steering, types) for gate in gates_of]

    with paths.replace_folder(paths.DATA_SCORED) as folder:
        for artifact in names:
            (folder / artifact).mkdir()
            for split in SPLITS:
                rows = score_rows(answers[split][artifact], scores, settings.primary_metric)
                write_jsonl(rows, folder / artifact / f"{split}.jsonl")
    for split, report in reports.items():
        marked = mark_engines(report, engine_of[split])
        json_files.write_json(paths.METRICS / f"evaluate/{split}.json", metric_files.wrap_in_list(marked))
    json_files.write_json(paths.METRICS / "evaluate/datasets.json", metric_files.wrap_in_list(by_dataset))
    json_files.write_json(paths.METRICS / "evaluate/pairwise.json", metric_files.wrap_in_list(pairwise))
    json_files.write_json(paths.METRICS / "evaluate/benchmark.json", metric_files.wrap_in_list(benchmark))
    json_files.write_json(paths.METRICS / "evaluate/samples.json", metric_files.wrap_in_list(sampled))
    gates = make_metrics(outcomes)
    json_files.write_json(paths.METRICS / "evaluate/gates.json", metric_files.wrap_in_list(gates))
    summary = summarize(reports["validation"], types, settings.primary_metric, passed=gates["passed"])
    json_files.write_json(paths.METRICS / "evaluate/summary.json", summary)
    metric_files.write_csv(paths.METRICS / "evaluate/scores.csv", make_plot_rows(reports, settings.primary_metric))


def _read_file_sizes(names: list[str]) -> dict[str, int]:
    files = {artifact: paths.METRICS / f"generate/{artifact}.json" for artifact in names}
    metrics_of = {artifact: json_files.read_json(file) for artifact, file in files.items()}
    return {artifact: metrics["file"][0]["bytes"] for artifact, metrics in metrics_of.items()}


if __name__ == "__main__":
    stage.run(main)
