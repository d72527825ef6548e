"""Turn raw rows into validated chat messages, split into train, validation and test.

reads   data/raw/, models/base/ (tokenizer), params.yaml: seed, preprocess, training.max_length; the dataset's preset
writes  data/processed/{train,validation,test}.jsonl, metrics/preprocess/{report.json,lengths.csv,rows.csv}
"""

import time

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.config.load import Config
from lathe.models import model_folder


def main(config: Config) -> stage.Throughput:
    model_folder.check_length(paths.MODEL_BASE, config.params.training.max_length)

    from lathe.data.prepare import prepare
    from lathe.models.tokenizer import load_tokenizer

    params = config.params
    tokenizer = load_tokenizer(paths.MODEL_BASE)
    started = time.perf_counter()
    with paths.replace_folder(paths.DATA_PROCESSED) as folder:
        prepared = prepare(
            paths.DATA_RAW,
            config.dataset,
            folder,
            tokenizer=tokenizer,
            seed=params.seed,
            max_length=params.training.max_length,
            settings=params.preprocess,
        )
    seconds = time.perf_counter() - started
    json_files.write_json(paths.METRICS / "preprocess/report.json", prepared.report)
    for name, rows in prepared.tables.items():
        metric_files.write_csv(paths.METRICS / f"preprocess/{name}.csv", rows)
    return {"rows_per_second": round(prepared.report["rows"]["read"] / seconds, 1)}


if __name__ == "__main__":
    stage.run(main)
