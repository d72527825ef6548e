"""Score every artifact's answers on the held-out rows, how sure that is, what each step cost, and judge the gates.

reads   data/generated/, metrics/generate/, models/encoder/ where evaluate.metrics lists bert_score,
        params.yaml: seed, evaluate, bert_score, judge.enabled, quantize.types
writes  metrics/evaluate/{validation,test,gates}.json, metrics/evaluate/scores.csv (for the plots),
        data/scored/<ARTIFACT>/{validation,test}.jsonl (rows with their own scores, worst first)
removes what is left of quantization types that are no longer listed
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.config import artifacts
from lathe.config.gates import parse
from lathe.config.load import Config
from lathe.evaluation.gate_results import metrics, outcome

SPLITS = ("validation", "test")


def main(config: Config) -> None:
    from lathe.common.jsonl import write_jsonl
    from lathe.evaluation.evaluate import (
        Sampling,
        add_bert_score,
        evaluate,
        plot_rows,
        read_answers,
        read_general,
        row_scores,
        scored_rows,
    )

    settings, types = config.params.evaluate, config.params.quantize.types
    names = artifacts.names(types)
    for folder in (paths.METRICS / "generate", paths.METRICS / "quantize", paths.GGUF):
        artifacts.forget_other_types(folder, types)
    judged = paths.DATA_JUDGED if config.params.judge.enabled else None
    answers = {split: read_answers(paths.DATA_GENERATED, judged, names, split) for split in SPLITS}
    if "bert_score" in settings.metrics:
        cache = paths.SCRATCH / "bert_score"
        add_bert_score(list(answers.values()), config.params.bert_score, seed=config.params.seed, cache=cache)

    scores = row_scores(
        settings.metrics,
        normalize=settings.normalize,
        answer_pattern=settings.answer_pattern,
        bert_score_weight=settings.bert_score_weight,
        judge_weight=settings.judge_weight if config.params.judge.enabled else None,
    )
    general, bytes_of = read_general(paths.DATA_GENERATED, names), _bytes(names)
    sampling = Sampling(settings.bootstrap_samples, config.params.seed)
    reports = {split: evaluate(answers[split], general, bytes_of, scores, sampling) for split in SPLITS}
    outcomes = [outcome(parse(gate), reports["validation"], types) for gate in settings.gates or []]

    with paths.whole_folder(paths.DATA_SCORED) as folder:
        for artifact in names:
            (folder / artifact).mkdir()
            for split in SPLITS:
                rows = scored_rows(answers[split][artifact], scores, settings.primary_metric)
                write_jsonl(rows, folder / artifact / f"{split}.jsonl")
    for split, report in reports.items():
        json_files.write_json(paths.METRICS / f"evaluate/{split}.json", report)
    json_files.write_json(paths.METRICS / "evaluate/gates.json", metrics(outcomes))
    metric_files.write_csv(paths.METRICS / "evaluate/scores.csv", plot_rows(reports, settings.primary_metric))


def _bytes(names: list[str]) -> dict[str, int]:
    files = {artifact: paths.METRICS / f"generate/{artifact}.json" for artifact in names}
    facts = {artifact: json_files.read_json(file) for artifact, file in files.items()}
    return {artifact: each["file"][0]["bytes"] for artifact, each in facts.items()}


if __name__ == "__main__":
    stage.run(main)
