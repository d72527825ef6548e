"""Files beside the weights of a merged model: tokenizer, chat template, configuration."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from lathe.models.merge.plan import HEADS, _Target
from lathe.models.merge.read_adapter import _Change, _module_of
from lathe.models.model_folder import (
    Weights,
    text_value,
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


# What is not weights ------------------------------------------------------------------------------


def _copy_companions(base: Path, adapter: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation configuration, licence: all but weights and hidden files.

    A tokenizer in the adapter's folder is the one it was trained with (tokens may have been added, the
    template set), and the one AutoTokenizer loads for the adapter: its files take the place of the base's.
    Vocabulary files that only the base has stay, for converters that read them (tokenizer.model). What the
    adapter's tokenizer_config.json states anew, template and special tokens, is not left over from the base.
    """
    for source in sorted(base.rglob("*")):
        relative = source.relative_to(base)
        if source.is_file() and not _is_weights(relative):
            _copy(source, out / relative)

    tokenizer = [adapter / name for name in sorted(TOKENIZER_FILES) if (adapter / name).is_file()]
    templates = [adapter / name for name in CHAT_TEMPLATE_FILES if (adapter / name).is_file()]
    templates += sorted((adapter / CHAT_TEMPLATE_FOLDER).glob("*.jinja"))
    restated = (adapter / "tokenizer_config.json").is_file()
    if restated or templates:
        for name in CHAT_TEMPLATE_FILES:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / CHAT_TEMPLATE_FOLDER, ignore_errors=True)
    if restated:
        (out / "special_tokens_map.json").unlink(missing_ok=True)
    for source in (*tokenizer, *templates):
        _copy(source, out / source.relative_to(adapter))


def _is_weights(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    index = relative.name.endswith(".index.json")
    # transformers takes a folder with an adapter_config.json for an adapter, not for a model.
    return hidden or index or relative.suffix in WEIGHT_SUFFIXES or relative.name == "adapter_config.json"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_config(path: Path, config: dict[str, Any], targets: list[_Target], base: Weights, out: Path) -> None:
    """Correct dtype, vocabulary size and tying where the merge changed them; else keep the very bytes."""
    correct: dict[str, Any] = {}
    dtypes = Counter[str]()
    for target in targets:
        if target.dtype in CONFIG_DTYPES:
            dtypes[CONFIG_DTYPES[target.dtype]] += target.bytes
        module = _module_of(target.name).rpartition(".")[2]
        if module in HEADS and target.shape != base.shape(target.source):
            correct["vocab_size"] = target.shape[0]
        if module in HEADS.values() and (target.change != _Change() or target.source != target.name):
            correct["tie_word_embeddings"] = False
    if dtypes:
        correct["dtype"] = correct["torch_dtype"] = dtypes.most_common(1)[0][0]

    corrected = _corrected(config, correct)
    if "tie_word_embeddings" in correct and text_value(config, "tie_word_embeddings") is None:
        corrected["tie_word_embeddings"] = False
    if corrected == config:
        shutil.copyfile(path, out)
    else:
        write_json(out, corrected)


def _corrected(config: dict[str, Any], correct: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the keys it has, at the top and in text_config, set to their correct values."""
    result = {key: correct.get(key, value) for key, value in config.items()}
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = _corrected(config["text_config"], correct)
    return result
