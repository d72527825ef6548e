"""Write the merged model in a format of another runtime: ONNX Runtime, MLX, or vLLM.

reads   models/merged/, models/gguf/merged-f16.gguf (its lineage), data/processed/train.jsonl (awq alone),
        params.yaml: seed, export
writes  models/exported/<FORMAT>/, metrics/quantize/<FORMAT>.json
items   the names in export.formats

With each folder goes lineage.json: what it was made from, as the GGUF files carry it in their metadata.
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.export_params import CALIBRATED
from lathe.config.load import Config


def main(config: Config, item: str) -> None:
    from lathe.common.scratch import temporary_folder
    from lathe.export.calibration_rows import draw_calibration_rows
    from lathe.export.convert import LINEAGE_FILE, convert
    from lathe.export.environments import check_architecture, find_python, read_versions
    from lathe.export.weights import count_bits_per_weight
    from lathe.gguf.header import read_metadata

    settings = config.params.export
    python = find_python(item, settings)
    versions = read_versions(item, python)
    check_architecture(item, paths.MODEL_MERGED)
    lineage = read_metadata(paths.GGUF / "merged-f16.gguf")
    rows = []
    if item in CALIBRATED:
        file = paths.DATA_PROCESSED / "train.jsonl"
        rows = draw_calibration_rows(paths.MODEL_MERGED, file, settings.calibration_rows, seed=config.params.seed)
    scratch = paths.SCRATCH / "export"
    with paths.replace_folder(paths.MODELS_EXPORTED / item) as folder:
        with temporary_folder(scratch, "export") as between:
            log = scratch / f"{item}.log"
            convert(item, python, paths.MODEL_MERGED, folder, rows=rows, scratch=between, log=log)
        made_from = {key: text for key, text in lineage.items() if key.startswith("lathe.")}
        made_from["lathe.artifact"] = item
        json_files.write_json(folder / LINEAGE_FILE, made_from)
    report = {"bits_per_weight": count_bits_per_weight(paths.MODELS_EXPORTED / item, paths.MODEL_MERGED)}
    if rows:
        report |= {"calibration_rows": len(rows), "calibration_tokens": sum(map(len, rows))}
    # A list, of which DVC makes no columns.
    json_files.write_json(paths.METRICS / f"quantize/{item}.json", {**report, "made_with": [versions]})


if __name__ == "__main__":
    stage.run_items(main, lambda config: config.params.export.formats, options=("format",))
