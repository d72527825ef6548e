"""Write backbone, head and temperature as one ONNX file, and hold ONNX Runtime against torch on every row of test.

reads   classify/models/{backbone,best_model}/, classify/models/calibration.json, classify/data/prepared/test.jsonl,
        classify/params.yaml: features, export
writes  classify/models/onnx/ (model.onnx, tokenizer, labels.json), classify/metrics/export.json
"""

import logging

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.config.classifier_config import ClassifierConfig


def main(config: ClassifierConfig) -> stage.Throughput:
    from lathe.classify import export_onnx
    from lathe.classify.labels import read_split

    models = paths.CLASSIFIER / "models"
    texts, _ = read_split(paths.CLASSIFIER / "data/prepared", "test")
    with paths.replace_folder(models / "onnx") as folder:
        report, measured = export_onnx.export(
            models / "best_model", models / "backbone", models / "calibration.json", texts, folder, config.params
        )
    report["bytes"] = (models / "onnx" / export_onnx.MODEL).stat().st_size
    json_files.write_json(paths.CLASSIFIER_METRICS / "export.json", metric_files.wrap_in_list(report))
    logging.getLogger("lathe.export").info(
        "ONNX Runtime gives torch's label for %d of %d texts; probabilities differ by at most %.2g",
        report["same_labels"],
        report["rows"],
        measured["largest_difference"],
    )
    return measured


if __name__ == "__main__":
    stage.run_classifier(main)
