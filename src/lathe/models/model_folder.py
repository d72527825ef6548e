"""Model folder on disk: configuration, and safetensors of which each tensor is read only when needed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.outside_files import check_sizes

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
# Beside the weights of full tuning: {"tuning": "full", "left": [names of the base's tensors that are not there]}.
TUNING_FILE = "tuning.json"

# Bytes per element of the types that torch can read, in the order of safetensors' own enumeration.
ITEMSIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 8),
}

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a safetensors file declares it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder by name, in the order of its files."""

    folder: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> "torch.Tensor":
        """Map one tensor from its file."""
        # Opened for every tensor: while a file is open, each page read from it counts as memory in use.
        with _open_safetensors(self.tensors[name].path, framework="pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.tensors[name].shape


def open_model(base: Path) -> Weights:
    """Open the weights of a model folder, one file or shards with an index; only their headers are read.

    Raises InputError where there are none, or only pickles, where a file was cut short, and where the index names
    what is not there.
    """
    if (base / SINGLE_FILE).is_file():
        return Weights(base, _read_header(base / SINGLE_FILE))
    if not (base / INDEX_FILE).is_file():
        pickles = sorted(path.name for path in base.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise InputError(
                f"{base / pickles[0]}: pickled weights can run code and are not read: save as safetensors",
                code="weights-pickled",
            )
        others = sorted(path.name for path in base.glob("*.safetensors"))
        remedy = f"name {others[0]} so if it is all of them" if len(others) == 1 else "give a whole model folder"
        raise InputError(
            f"{base}: no weights, neither {SINGLE_FILE} nor {INDEX_FILE}: {remedy}", code="weights-missing"
        )

    weight_map = _read_weight_map(base / INDEX_FILE)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (base / shard).is_file():
            raise InputError(
                f"{base / shard}: missing, but {INDEX_FILE} names it: copy the model folder again", code="shard-missing"
            )
        declared = _read_header(base / shard)
        tensors.update({name: stored for name, stored in declared.items() if weight_map.get(name) == shard})
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(
                f"{base / shard}: no tensor {name}, but {INDEX_FILE} names it: copy the model folder again",
                code="tensor-missing",
            )
    return Weights(base, tensors)


def list_shards(index: Path) -> set[str]:
    """Return the files that an index names; raises InputError where it names none."""
    return set(_read_weight_map(index).values())


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    if not is_map or not weight_map:
        raise InputError(
            f"{index}: no 'weight_map', so no shard is known: copy the model folder again",
            code="index-without-weight-map",
        )
    return dict(weight_map)


def open_adapter(adapter: Path) -> Weights:
    """Open the weights of an adapter folder that PEFT saved; raises InputError as `open_model` does."""
    path = adapter / ADAPTER_FILE
    if path.is_file():
        return Weights(adapter, _read_header(path))
    pickle = adapter / "adapter_model.bin"
    if pickle.is_file():
        raise InputError(
            f"{pickle}: pickled weights can run code and are not read: save the adapter as safetensors",
            code="weights-pickled",
        )
    raise InputError(f"{path}: missing: give the folder that PEFT's save_pretrained wrote", code="weights-missing")


def read_untrained_names(adapter: Path) -> list[str] | None:
    """Return the names of the base's tensors that full tuning did not train; None for the folder of an adapter.

    Raises InputError where `tuning.json`, which full tuning writes, cannot be read.
    """
    path = adapter / TUNING_FILE
    if not path.exists():
        return None
    note = read_json(path)
    left = note.get("left")
    if note.get("tuning") != "full" or not isinstance(left, list) or not all(isinstance(name, str) for name in left):
        raise InputError(
            f"{path}: must hold 'tuning': 'full' and the list 'left': train again", code="tuning-note-invalid"
        )
    return left


def read_config(base: Path) -> dict[str, Any]:
    """Read a model's config.json; raises InputError where there is none, and for a quantized model."""
    if not base.is_dir():
        raise InputError(f"{base}: not a folder: give the folder of the base model", code="not-a-folder")
    config = read_json(base / "config.json")
    check_sizes(config, str(base))
    if config.get("quantization_config"):
        raise InputError(
            f"{base / 'config.json'}: 'quantization_config' is set, a merge needs weights never quantized: "
            "give the 16-bit model",
            code="weights-quantized",
        )
    return config


def check_length(folder: Path, max_length: int) -> None:
    """Raise InputError where `max_length` (tokens) is more than the model in `folder` reads."""
    config = read_json(folder / "config.json")
    longest = get_text_value(config, "max_position_embeddings")
    if isinstance(longest, int) and max_length > longest:
        raise InputError(
            f"training.max_length is {max_length} tokens; the model reads at most {longest}; lower it",
            code="length-too-long",
        )


def get_text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a configuration."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def get_text_value(config: dict[str, Any], key: str) -> Any:
    """Return a value of the language model's configuration, which multimodal models have in `text_config`."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises InputError where the file holds anything else."""
    content: dict[str, Any] = read_json_object(path, remedy="copy the whole folder again")
    return content


def write_json(path: Path, content: dict[str, Any], *, sort_keys: bool = False) -> None:
    """Write a JSON file of a model: indented by two spaces, a newline at the end."""
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with _open_safetensors(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        declared = {
            name: StoredTensor(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
        }
    for name, stored in declared.items():
        if stored.dtype not in ITEMSIZES:
            raise InputError(
                f"{path}: {name} is stored as {stored.dtype}, which is not read: give 16-bit weights",
                code="tensor-type-unknown",
            )
    return declared


def _open_safetensors(path: Path, framework: str) -> Any:
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a whole safetensors file ({reason}): copy or download it again", code="safetensors-invalid"
        ) from None
