"""Files beside the weights of a merged model: tokenizer, chat template, configuration."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from lathe.models.merge.plan import MergedTensor
from lathe.models.merge.read_adapter import HEADS, TensorChange, get_module_name
from lathe.models.model_folder import (
    Weights,
    get_text_value,
    read_json,
    write_json,
)

CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack"),
    *(".npz", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite"),
}
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
}
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"


def copy_companion_files(base: Path, adapter: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation configuration, licence: all but weights and hidden files.

    A tokenizer in the adapter's folder is the one of the training (tokens may have been added, the template set), and
    the one AutoTokenizer loads for the adapter: its files replace the base's. Vocabulary files that only the base has
    are kept, for converters that read them (tokenizer.model). If the adapter has a tokenizer_config.json, template and
    special tokens of the base are not kept.
    """
    for source in sorted(base.rglob("*")):
        relative = source.relative_to(base)
        if source.is_file() and not _is_weight_file(relative):
            _copy(source, out / relative)

    tokenizer = [adapter / name for name in sorted(TOKENIZER_FILES) if (adapter / name).is_file()]
    templates = [adapter / name for name in CHAT_TEMPLATE_FILES if (adapter / name).is_file()]
    templates += sorted((adapter / CHAT_TEMPLATE_FOLDER).glob("*.jinja"))
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    if has_tokenizer or templates:
        for name in CHAT_TEMPLATE_FILES:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / CHAT_TEMPLATE_FOLDER, ignore_errors=True)
    if templates and not has_tokenizer:
        _drop_template(out / "tokenizer_config.json")  # llama.cpp's converter would take it
    if has_tokenizer:
        (out / "special_tokens_map.json").unlink(missing_ok=True)
    for source in (*tokenizer, *templates):
        _copy(source, out / source.relative_to(adapter))


def _drop_template(file: Path) -> None:
    """Take the chat template out of a copied tokenizer_config.json."""
    if file.is_file() and "chat_template" in (config := read_json(file)):
        write_json(file, {key: value for key, value in config.items() if key != "chat_template"})


def _is_weight_file(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    index = relative.name.endswith(".index.json")
    # transformers takes a folder with an adapter_config.json for an adapter, not for a model.
    return hidden or index or relative.suffix in WEIGHT_SUFFIXES or relative.name == "adapter_config.json"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_merged_config(
    path: Path, config: dict[str, Any], targets: list[MergedTensor], base: Weights, out: Path
) -> None:
    """Write config.json with dtype, vocabulary size and tying corrected; copy it if the merge changed none of them."""
    correct: dict[str, Any] = {}
    dtypes = Counter[str]()
    for target in targets:
        if target.dtype in CONFIG_DTYPES:
            dtypes[CONFIG_DTYPES[target.dtype]] += target.bytes
        module = get_module_name(target.name).rpartition(".")[2]
        if module in HEADS and target.shape != base.shape(target.source):
            correct["vocab_size"] = target.shape[0]
        if module in HEADS.values() and (target.change != TensorChange() or target.source != target.name):
            correct["tie_word_embeddings"] = False
    if dtypes:
        correct["dtype"] = correct["torch_dtype"] = dtypes.most_common(1)[0][0]

    corrected = _correct_config(config, correct)
    if "tie_word_embeddings" in correct and get_text_value(config, "tie_word_embeddings") is None:
        corrected["tie_word_embeddings"] = False
    if corrected == config:
        shutil.copyfile(path, out)
    else:
        write_json(out, corrected)


def _correct_config(config: dict[str, Any], correct: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with its keys, at the top and in text_config, set to their correct values."""
    result = {key: correct.get(key, value) for key, value in config.items()}
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = _correct_config(config["text_config"], correct)
    return result
