"""Fit the baselines that every report shows: majority class, and logistic regression on TF-IDF and on the features.

reads   classify/data/prepared/, classify/data/features/, classify/params.yaml: seed, baselines, training.class_weights
writes  classify/data/baselines/NAME/{validation,test}.jsonl, classify/metrics/baselines.json
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.common.jsonl import write_jsonl
from lathe.config.classifier_config import ClassifierConfig


def main(config: ClassifierConfig) -> stage.Throughput:
    from lathe.classify.baselines import run_baselines

    data = paths.CLASSIFIER / "data"
    found = run_baselines(data / "prepared", data / "features", config.params)
    with paths.replace_folder(data / "baselines") as out:
        for name, baseline in found.items():
            (out / name).mkdir()
            for split, answers in baseline.answers.items():
                write_jsonl(answers, out / name / f"{split}.jsonl")
    sizes = {"bytes": {name: baseline.bytes for name, baseline in found.items()}}
    json_files.write_json(paths.CLASSIFIER_METRICS / "baselines.json", metric_files.wrap_in_list(sizes))
    rows = len(found["majority"].answers["test"])
    return {f"{name}_seconds_per_1000": round(1000 * one.seconds / rows, 4) for name, one in found.items()}


if __name__ == "__main__":
    stage.run_classifier(main)
