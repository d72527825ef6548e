"""Conversion of a LoRA adapter to GGUF, by llama.cpp's own converter, unless llama.cpp cannot add it to a model."""

import json
import math
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.json_files import read_json
from lathe.common.scratch import temporary_folder
from lathe.gguf.converter_process import run_converter


class AdapterError(InputError):
    """An adapter that llama.cpp cannot add to a model; the message says why."""


def convert_adapter(
    adapter: Path, base: Path, out: Path, *, outtype: str, llama_cpp: Path, metadata: dict[str, str]
) -> None:
    """Write the LoRA adapter in the folder `adapter` to the GGUF file `out`, with llama.cpp's own converter.

    `base` is the folder of the model it was trained on; all else is as for `convert.convert`. llama.cpp adds the
    adapter to a GGUF of that model when it loads it. Raises AdapterError if llama.cpp cannot add the adapter: for
    trained magnitudes (DoRA), layers trained whole, updates of embeddings that are also the output head, or anything
    else that its converter refuses.
    """
    if not (llama_cpp / "convert_lora_to_gguf.py").is_file():
        raise InputError(
            f"{llama_cpp}: no convert_lora_to_gguf.py; run `make setup`, or name a llama.cpp checkout in "
            f"convert.llama_cpp_dir",
            code="no-converter",
        )
    config = read_json(adapter / "adapter_config.json")
    _check_adapter(config, adapter, base)
    # llama.cpp scales by alpha / r, whatever the configuration says of rank-stabilised LoRA.
    if config["use_rslora"]:
        config["lora_alpha"] *= math.sqrt(config["r"])
    with temporary_folder(out.parent, "adapter-input") as parent:
        folder = parent / "adapter"  # the converter takes parts of its name for names of the model
        folder.mkdir()
        (folder / "adapter_model.safetensors").symlink_to((adapter / "adapter_model.safetensors").absolute())
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        arguments = [
            str(folder),
            "--base",
            str(base.absolute()),
            "--outfile",
            str(out.absolute()),
            "--outtype",
            outtype,
        ]
        refusal = run_converter(
            llama_cpp, "convert_lora_to_gguf.py", {"general.name": "adapter", **metadata}, arguments, out
        )
    if refusal:
        raise AdapterError(f"llama.cpp's converter refuses it: {refusal}", code="conversion-refused")


def _check_adapter(config: dict[str, Any], adapter: Path, base: Path) -> None:
    from safetensors import safe_open

    if config["use_dora"]:
        raise AdapterError(
            "it holds magnitudes (lora.use_dora), which llama.cpp does not know", code="adapter-with-dora"
        )
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as weights:
        names = list(weights.keys())
    # PEFT may save the base's embeddings beside their update, unchanged.
    trained = [name.removeprefix("base_model.model.") for name in names if ".base_layer." not in name]
    whole = sorted(name for name in trained if ".lora_" not in name)
    if whole:
        # Its converter refuses some of them; others llama.cpp ignores without a warning.
        raise AdapterError(
            f"it holds layers trained whole (lora.modules_to_save): {', '.join(whole)}",
            code="adapter-with-whole-layers",
        )
    tied = read_json(base / "config.json").get("tie_word_embeddings")
    if tied and any(".lora_embedding_" in name for name in names):
        raise AdapterError(
            "it updates embeddings that are the output head too, which llama.cpp keeps as one tensor",
            code="adapter-with-tied-embeddings",
        )
