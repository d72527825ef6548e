"""Add the adapter to the 16-bit base, or take the weights trained whole; never through quantized weights.

reads   models/base/, models/adapter/, params.yaml: merge
writes  models/merged/, metrics/merge/report.json
"""

from dataclasses import asdict

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config


def main(config: Config) -> None:
    from lathe.models.merge.merge import merge

    settings = config.params.merge
    with paths.replace_folder(paths.MODEL_MERGED) as folder:
        report = merge(
            paths.MODEL_BASE,
            paths.MODEL_ADAPTER,
            folder,
            dtype=settings.dtype,
            max_shard_size_bytes=settings.max_shard_size_bytes,
        )
    json_files.write_json(paths.METRICS / "merge/report.json", asdict(report))


if __name__ == "__main__":
    stage.run(main)
