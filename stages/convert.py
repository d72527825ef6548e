"""Convert safetensors to a 16-bit GGUF with llama.cpp's own converter.

The file is of f16, or of bf16 if f16 cannot hold a weight. That it is the same model is for `check_converted` to prove.

reads   models/{base,merged}/, params.yaml: convert, preprocess.chat_template_kwargs; for the digests in the file all
        else that it comes from: metrics/fetch/, data/processed/, models/adapter/, params.yaml, presets.yaml
writes  models/gguf/{base,merged}-f16.gguf, metrics/convert/{base,merged}.json; base models/gguf/mmproj/ too: the part
        that reads images, which training leaves as it is, or a note where there is none
items   base, merged
"""

import logging
from pathlib import Path

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config

logger = logging.getLogger("lathe.convert")


def main(config: Config, item: str) -> None:
    from lathe.gguf.convert import convert
    from lathe.models.weight_range import find_beyond_f16
    from lathe.provenance import lineage

    model = paths.ROOT / "models" / item
    settings = config.params.convert
    llama_cpp = paths.ROOT / settings.llama_cpp_dir if settings.llama_cpp_dir else paths.LLAMA_CPP
    metadata = lineage.build_metadata(item)
    # The merged model has the template of training already.
    if item == "base" and (options := config.params.preprocess.chat_template_kwargs):
        from lathe.models.template_options import load_tokenizer_with_options
        from lathe.models.template_text import choose_template_text

        metadata["tokenizer.chat_template"] = choose_template_text(load_tokenizer_with_options(model, options))
    if beyond := find_beyond_f16(model):
        logger.warning("models/%s: %s holds %g, more than f16 can; the GGUF is of bf16", item, *beyond)
    outtype = "bf16" if beyond else "f16"
    with paths.replace_file(paths.GGUF / f"{item}-f16.gguf") as partial:
        convert(model, partial, outtype=outtype, llama_cpp=llama_cpp, metadata=metadata)
        if item == "base":
            _convert_projector(model, llama_cpp, lineage.build_metadata(item))
    json_files.write_json(paths.METRICS / f"convert/{item}.json", {"type": [outtype]})


def _convert_projector(model: Path, llama_cpp: Path, metadata: dict[str, str]) -> None:
    from lathe.common.errors import InputError
    from lathe.gguf.convert import convert_projector
    from lathe.models.model_folder import read_config

    with paths.replace_folder(paths.GGUF / "mmproj") as folder:
        if not read_config(model).get("vision_config"):
            paths.mark_unused(folder, "the base has no part that reads images")
            return
        try:
            convert_projector(model, folder / "mmproj-f16.gguf", llama_cpp=llama_cpp, metadata=metadata)
        except InputError as error:
            logger.warning("no GGUF of the part that reads images: %s", error)
            paths.mark_unused(folder, f"llama.cpp's converter refuses the part that reads images: {error}")


if __name__ == "__main__":
    stage.run_items(main, lambda _: ["base", "merged"])
