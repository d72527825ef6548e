"""Turn raw rows into validated chat messages, split into train, validation and test.

reads   data/raw/, models/base/ (tokenizer), params.yaml: seed, preprocess, training.max_length; the dataset's preset
writes  data/processed/{train,validation,test}.jsonl, metrics/preprocess/{report.json,lengths.csv,rows.csv};
        where it fails .scratch/preprocess/report.json, as DVC removes the outputs of a stage that failed
"""

import time

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths, row_report
from lathe.common.errors import InputError
from lathe.config.load import Config
from lathe.models import model_folder


def main(config: Config) -> stage.Throughput:
    model_folder.check_length(paths.MODEL_BASE, config.params.training.max_length)

    from lathe.data.prepare import UnusableRowsError, prepare
    from lathe.models.tokenizer import load_tokenizer

    params = config.params
    tokenizer = load_tokenizer(paths.MODEL_BASE, params.preprocess.chat_template_kwargs)
    started = time.perf_counter()
    try:
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
    except UnusableRowsError as error:
        shown = row_report.keep_report(error.report)
        raise InputError(f"{error}; {shown} reports all rows", code=error.code) from None
    seconds = time.perf_counter() - started
    report = paths.METRICS / "preprocess/report.json"
    json_files.write_json(report, prepared.report)
    for name, rows in prepared.tables.items():
        metric_files.write_csv(paths.METRICS / f"preprocess/{name}.csv", rows)
    row_report.log_rows(prepared.report, file=str(report.relative_to(paths.ROOT)))
    return {"rows_per_second": round(prepared.report["rows"]["read"] / seconds, 1)}


if __name__ == "__main__":
    stage.run(main)
