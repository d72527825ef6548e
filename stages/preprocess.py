"""Turn raw rows into validated chat messages, split into train, validation and test.

reads   data/raw/, models/base/ (tokenizer), params.yaml: seed, preprocess, training.max_length, convert,
        evaluate.cluster_by; the dataset's preset
writes  data/processed/{train,validation,test}.jsonl, metrics/preprocess/{report.json,lengths.csv,rows.csv};
        where it fails .scratch/preprocess/report.json, as DVC removes the outputs of a stage that failed
"""

import time
from pathlib import Path
from typing import Any

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths, row_report
from lathe.common.errors import InputError
from lathe.common.text import shorten_value
from lathe.config.load import Config
from lathe.models import model_folder

COMPARED_BYTES = 8_000_000  # of each split, at most, whose token ids are compared with llama.cpp's


def main(config: Config) -> stage.Throughput:
    model_folder.check_length(paths.MODEL_BASE, config.params.training.max_length)

    from lathe.data.prepare import UnusableRowsError, prepare
    from lathe.models.template_options import load_tokenizer_with_options

    params = config.params
    tokenizer = load_tokenizer_with_options(paths.MODEL_BASE, params.preprocess.chat_template_kwargs)
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
                cluster_by=params.evaluate.cluster_by,
            )
            token_ids = _compare_token_ids(config, tokenizer, folder)
    except UnusableRowsError as error:
        shown = row_report.keep_report(error.report)
        raise InputError(f"{error}; {shown} reports all rows", code=error.code) from None
    seconds = time.perf_counter() - started
    report = paths.METRICS / "preprocess/report.json"
    # In a list, of which DVC makes no columns.
    json_files.write_json(report, {**prepared.report, "token_ids": [token_ids] if token_ids else []})
    for name, rows in prepared.tables.items():
        metric_files.write_csv(paths.METRICS / f"preprocess/{name}.csv", rows)
    row_report.log_rows(prepared.report, file=str(report.relative_to(paths.ROOT)))
    return {"rows_per_second": round(prepared.report["rows"]["read"] / seconds, 1)}


def _compare_token_ids(config: Config, tokenizer: Any, folder: Path) -> dict[str, Any] | None:
    """Hold the token ids of the rows against llama.cpp's, hours before `convert` would; None without a converter."""
    from lathe.gguf import install_converter, tokenizer_parity
    from lathe.gguf.row_texts import RowTexts
    from lathe.gguf.vocabulary import get_vocabulary
    from lathe.models.tokenizer_template import read_chat_template

    settings, shown = config.params.convert, f"model {config.params.model}"
    llama_cpp, state = install_converter.find_converter(paths.ROOT, settings.llama_cpp_dir)
    if state == "missing":
        return None
    splits = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    texts = RowTexts(read_chat_template(tokenizer), splits, max_bytes=COMPARED_BYTES)
    try:
        parity = tokenizer_parity.compare_tokenizers(
            paths.MODEL_BASE,
            get_vocabulary(paths.MODEL_BASE, llama_cpp=llama_cpp, shown=shown),
            texts,
            samples=settings.tokenizer_parity,
            shown=shown,
        )
    except tokenizer_parity.TokenIdsError as error:
        if error.number is None:
            raise
        raise InputError(
            f"{texts.describe_place(error.number)} ({shorten_value(error.text)}): its token ids "
            f"{error.difference}; the trained model would not read such rows in llama.cpp; leave them out, or choose "
            "another base",
            code="token-ids-differ",
        ) from None
    return {"rows_compared": texts.rows, **parity.describe()}


if __name__ == "__main__":
    stage.run(main)
