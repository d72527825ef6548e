"""List the local files that the selected presets name, with their digests.

reads   data/local/, models/local/, params.yaml: model, dataset, bert_score.model, evaluate.metrics;
        their entries in presets.yaml
writes  metrics/local_files/{model,dataset,encoder}.json
items   model, dataset, encoder

`fetch` depends on these lists, and not on the folders: another file there runs this stage again, and nothing else.
A local file that is missing is not in the list; `fetch` says so.
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config
from lathe.config.local_paths import ITEMS, list_local_files


def main(config: Config, item: str) -> None:
    json_files.write_json(paths.METRICS / f"local_files/{item}.json", list_local_files(config, item))


if __name__ == "__main__":
    stage.run_items(main, lambda _: list(ITEMS))
