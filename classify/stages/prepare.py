"""Turn raw rows into texts with labels, split into train, validation and test.

reads   classify/data/raw/, classify/params.yaml: seed, data without max_length; the dataset's preset
writes  classify/data/prepared/{train,validation,test}.jsonl and labels.json, classify/metrics/prepare/report.json
"""

import logging

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.config.classifier_config import ClassifierConfig


def main(config: ClassifierConfig) -> None:
    from lathe.classify.prepare import list_warnings, prepare

    with paths.replace_folder(paths.CLASSIFIER / "data/prepared") as folder:
        report = prepare(paths.CLASSIFIER / "data/raw", config.dataset, folder, config.params)
    json_files.write_json(paths.CLASSIFIER_METRICS / "prepare/report.json", metric_files.wrap_in_list(report))
    rows = " ".join(f"{split['split']} {split['rows']}" for split in report["splits"])
    log = logging.getLogger("lathe.prepare")
    log.info("%d rows read; %s; %d classes", report["rows"]["read"], rows, report["splits"][0]["classes"])
    for line in list_warnings(report):
        log.warning("%s", line)


if __name__ == "__main__":
    stage.run_classifier(main)
