"""List the local files that the selected presets name, with their digests.

reads   data/local/, models/local/, classify/params.yaml: model.backbone, dataset; their entries in presets.yaml
writes  classify/metrics/local_files/{model,dataset}.json
items   model, dataset

`fetch` depends on these lists, and not on the folders: another file there runs this stage again, and nothing else.
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.classifier_config import ClassifierConfig
from lathe.config.local_paths import describe_files
from lathe.config.presets import LocalDataset, LocalModel


def main(config: ClassifierConfig, item: str) -> None:
    preset = config.model if item == "model" else config.dataset
    named = [preset.path] if isinstance(preset, LocalModel | LocalDataset) else []
    files = {"files": describe_files(named)}
    json_files.write_json(paths.CLASSIFIER_METRICS / f"local_files/{item}.json", files)


if __name__ == "__main__":
    stage.run_classifier_items(main, ["model", "dataset"])
