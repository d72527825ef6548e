"""Train the head on the kept features, or head and backbone together on the texts.

reads   classify/data/prepared/, classify/data/features/, classify/models/backbone/,
        classify/params.yaml: seed, model, data.max_length, features, training, lora
writes  classify/models/{best_model,final_model,classifier_head}/, classify/metrics/train/ (curves, last values),
        classify/metrics/freeze_proof.json, classify/metrics/trained.json, classify/metrics/train.log

train.log holds the memory of every point too, which varies from run to run: it is no output that DVC knows.
"""

import logging

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.config.classifier_config import ClassifierConfig


def main(config: ClassifierConfig) -> None:
    from lathe.classify.backbone import check_length

    data, models, metrics = paths.CLASSIFIER / "data", paths.CLASSIFIER / "models", paths.CLASSIFIER_METRICS
    check_length(models / "backbone", config.params.data.max_length)

    from lathe.classify.model import save_classifier, save_head
    from lathe.classify.train import train

    trained = train(
        models / "backbone",
        data / "prepared",
        data / "features",
        metrics / "train",
        metrics / "train.log",
        config.params,
    )
    for name, tensors in (("best_model", trained.best), ("final_model", trained.final)):
        with paths.replace_folder(models / name) as folder:
            save_classifier(folder, tensors, trained.architecture, trained.labels)
    with paths.replace_folder(models / "classifier_head") as folder:
        save_head(folder, trained.best, trained.architecture, trained.labels)
    json_files.write_json(metrics / "freeze_proof.json", metric_files.wrap_in_list(trained.proof))
    json_files.write_json(metrics / "trained.json", metric_files.wrap_in_list(trained.summary))
    logging.getLogger("lathe.train").info(
        "best of %d epochs: %d, %s %.4f on validation; %d of %d tensors of the backbone were trained",
        trained.summary["epochs"],
        trained.summary["best_epoch"],
        trained.summary["metric"],
        trained.summary["best_val_score"],
        trained.proof["trained_tensors"],
        trained.proof["trained_tensors"] + trained.proof["frozen_tensors"],
    )


if __name__ == "__main__":
    stage.run_classifier(main)
