"""Convert the adapter alone to GGUF, to be added to the base model's as llama.cpp loads it.

reads   models/adapter/, models/base/; for what the file says of its origin data/processed/, metrics/fetch/, and the
        parameters and presets upstream; params.yaml: convert
writes  models/gguf/adapter/adapter-f16.gguf, metrics/convert/adapter.json: its bytes; where llama.cpp has no form for
        what was trained, an empty folder and the reason
"""

import logging

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config
from lathe.models.model_folder import read_untrained_names

logger = logging.getLogger("lathe.convert_adapter")


def main(config: Config) -> None:
    from lathe.gguf.convert_adapter import AdapterError, convert_adapter
    from lathe.provenance import lineage

    chosen = config.params.convert.llama_cpp_dir
    facts: dict[str, int | str | None] = {"bytes": None, "reason": None}
    with paths.replace_folder(paths.GGUF / "adapter") as folder:
        target = folder / "adapter-f16.gguf"
        try:
            if read_untrained_names(paths.MODEL_ADAPTER) is not None:
                raise AdapterError("all weights were trained (training.tuning: full): there is no adapter")
            convert_adapter(
                paths.MODEL_ADAPTER,
                paths.MODEL_BASE,
                target,
                outtype="f16",
                llama_cpp=paths.ROOT / chosen if chosen else paths.LLAMA_CPP,
                metadata=lineage.build_metadata("adapter"),
            )
            facts["bytes"] = target.stat().st_size
        except AdapterError as error:
            facts["reason"] = str(error)
            logger.info("no GGUF of the adapter alone: %s", error)
    json_files.write_json(paths.METRICS / "convert/adapter.json", facts)


if __name__ == "__main__":
    stage.run(main)
