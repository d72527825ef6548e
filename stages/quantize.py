"""Quantize the merged model, one GGUF per type, in process through llama.cpp or with a program of the user's.

reads   models/gguf/merged-f16.gguf, models/imatrix/, params.yaml: quantize
writes  models/gguf/<TYPE>.gguf, metrics/quantize/<TYPE>.json
items   the types in quantize.types
"""

import os

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config


def main(config: Config, item: str) -> None:
    from lathe.gguf.description import describe_gguf
    from lathe.gguf.quantize import quantize

    target = paths.GGUF / f"{item}.gguf"
    settings = config.params.quantize
    with paths.replace_file(target) as partial:
        quantize(
            paths.GGUF / "merged-f16.gguf",
            partial,
            type=item,
            threads=os.cpu_count() or 1,
            binary=paths.ROOT / settings.binary if settings.binary else None,
            importance=paths.IMATRIX / "imatrix.gguf" if settings.imatrix else None,
            output_tensor_type=settings.output_tensor_type,
            token_embedding_type=settings.token_embedding_type,
            tensor_types=settings.tensor_types or [],
        )
    json_files.write_json(
        paths.METRICS / f"quantize/{item}.json", {"bits_per_weight": describe_gguf(target)["bits_per_weight"]}
    )


if __name__ == "__main__":
    stage.run_items(main, lambda config: config.params.quantize.types)
