"""Bring the selected base model and dataset into the pipeline.

reads   params.yaml: model, dataset, seed; their entries in presets.yaml; models/local/, data/local/, the hub
writes  models/base/, data/raw/, metrics/fetch/{model,dataset}.json
items   model, dataset
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config
from lathe.sources import fetch

ITEMS = ["model", "dataset"]


def main(config: Config, item: str) -> None:
    seed = config.params.seed
    target = paths.MODEL_BASE if item == "model" else paths.DATA_RAW
    with paths.whole_folder(target) as folder:
        if item == "model":
            origin = fetch.fetch_model(config.model, folder, seed=seed)
        else:
            origin = fetch.fetch_dataset(config.dataset, folder, seed=seed)
    # A list, of which DVC makes no columns: its parameters say the same.
    json_files.write_json(paths.METRICS / "fetch" / f"{item}.json", {"origin": [_facts(config, item, origin)]})


def _facts(config: Config, item: str, origin: fetch.Origin) -> dict[str, object]:
    target = paths.MODEL_BASE if item == "model" else paths.DATA_RAW
    files = sorted(file for file in target.iterdir() if file.is_file())
    preset = config.model if item == "model" else config.dataset
    return {
        "name": config.params.model if item == "model" else config.params.dataset,
        "source": preset.source,
        **origin,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


if __name__ == "__main__":
    stage.run_items(main, lambda _: ITEMS)
