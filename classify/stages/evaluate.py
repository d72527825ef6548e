"""Answer validation and test with the best classifier, and score it beside the baselines.

reads   classify/models/{backbone,best_model}/, classify/data/{prepared,features,baselines}/,
        classify/metrics/trained.json, classify/params.yaml: seed, features, evaluate
writes  classify/data/predictions/, classify/models/calibration.json (temperature, threshold),
        classify/metrics/metrics.json, classify/metrics/evaluate/{validation,test}.json and the plots' data beside them
"""

import logging

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.config.classifier_config import ClassifierConfig


def main(config: ClassifierConfig) -> stage.Throughput:
    from lathe.classify import evaluate, scores
    from lathe.classify.baselines import NAMES

    data, models, metrics = paths.CLASSIFIER / "data", paths.CLASSIFIER / "models", paths.CLASSIFIER_METRICS
    found = evaluate.answer_splits(
        models / "best_model", models / "backbone", data / "prepared", data / "features", config.params
    )
    with paths.replace_folder(data / "predictions") as folder:
        for split, answers in found.answers.items():
            write_jsonl(answers, folder / f"{split}.jsonl")
    json_files.write_json(models / "calibration.json", vars(found.calibration))
    reports = {}
    for split in evaluate.SPLITS:
        baselines = {name: read_jsonl(data / "baselines" / name / f"{split}.jsonl") for name in NAMES}
        everyone = {evaluate.CLASSIFIER: found.answers[split], **baselines}
        reports[split] = evaluate.make_report(everyone, found.labels, config.params)
        json_files.write_json(metrics / f"evaluate/{split}.json", metric_files.wrap_in_list(reports[split]))
    trained = metric_files.unwrap_list(json_files.read_json(metrics / "trained.json"))
    json_files.write_json(metrics / "metrics.json", evaluate.make_summary(reports, trained, found.calibration))
    answers = found.answers["test"]
    metric_files.write_csv(metrics / "evaluate/confusion.csv", scores.tabulate_confusion(answers))
    bins = config.params.evaluate.calibration_bins
    metric_files.write_csv(metrics / "evaluate/reliability.csv", scores.tabulate_reliability(answers, bins))
    for name, one in reports["test"].items():
        ends = next(one_of for one_of in one["intervals"] if one_of["metric"] == "accuracy")
        low, high = (one["accuracy"] if end is None else end for end in (ends["low"], ends["high"]))
        logging.getLogger("lathe.evaluate").info(
            "%s: accuracy %.4f [%.4f, %.4f], macro-F1 %.4f on test", name, one["accuracy"], low, high, one["macro_f1"]
        )
    return {"seconds_per_1000": round(found.seconds_per_1000, 4)}


if __name__ == "__main__":
    stage.run_classifier(main)
