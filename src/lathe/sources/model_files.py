"""Model files: which of a folder or repository are taken, safetensors and the texts that describe them."""

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.text import did_you_mean
from lathe.config.adapter_base import ADAPTER_CONFIG
from lathe.models import model_folder

if TYPE_CHECKING:
    from lathe.sources.hub import Repository

# Nothing that is unpickled or run.
PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "README*",
)


def fetch_hub_files(repository: "Repository") -> dict[str, Path]:
    """Download and verify the files to take of a repository; return their paths in the Hub's cache, by name."""
    names = select_files([path for path in repository.paths if "/" not in path], repository.name)
    model_folder.read_config(repository.files(["config.json"])["config.json"].parent)
    index = model_folder.INDEX_FILE
    folder = repository.files([index])[index].parent if index in names else Path()
    names = choose_weight_files(names, folder, repository.name)
    files = repository.files(names)
    model_folder.open_model(files["config.json"].parent)
    return files


def fetch_hub_adapter(repository: "Repository") -> Path:
    """Download and verify an adapter of PEFT with its tokenizer; return its folder in the Hub's cache."""
    from lathe.models.merge.copy_files import CHAT_TEMPLATE_FILES, TOKENIZER_FILES

    wanted = {ADAPTER_CONFIG, model_folder.ADAPTER_FILE, *TOKENIZER_FILES, *CHAT_TEMPLATE_FILES}
    if model_folder.ADAPTER_FILE not in repository.paths:
        raise InputError(
            f"{repository.name}: is an adapter of PEFT without {model_folder.ADAPTER_FILE}; pickled weights are never "
            "loaded; save it as safetensors",
            code="pickled-weights",
        )
    return repository.files([name for name in repository.paths if name in wanted])[ADAPTER_CONFIG].parent


def describe_lost_base(shown: str, named: str) -> str:
    """Return what to do about an adapter in place of a model whose base is not where its configuration says."""
    base = f"whose base {named!r} is neither under models/local nor on the Hub" if named else "which names no base"
    return (
        f"{shown}: is an adapter of PEFT, {base}; give the base in the preset (`path` of a folder under models/local, "
        "or `id` on the Hub), and the adapter's folder under models/local as `adapter`"
    )


def fetch_hub_file(repository: "Repository", name: str) -> Path:
    """Download and verify one file of a repository; return its path in the Hub's cache.

    Raises InputError if the repository has no such file.
    """
    if name not in repository.paths:
        known = [path for path in repository.paths if path.endswith(Path(name).suffix)]
        raise InputError(
            f"presets.yaml: file is {name!r}, but {repository.name} has no such file; {did_you_mean(name, known)}",
            code="no-such-file",
        )
    return repository.files([name])[name]


def select_files(names: list[str], shown: str) -> list[str]:
    """Return the names to take of those in a model's folder; raises InputError if the model is incomplete."""
    if ADAPTER_CONFIG in names:
        raise InputError(
            f"{shown}: holds a model and an adapter of PEFT ({ADAPTER_CONFIG}); which is meant cannot be told: move "
            "the adapter's files to a folder of their own, and name that as adapter in the preset to have it merged",
            code="model-and-adapter",
        )
    for name in ("config.json", "tokenizer_config.json"):
        if name not in names:
            raise InputError(
                f"{shown}: holds no {name}; give a complete Hugging Face model folder", code="incomplete-model"
            )
    if not fnmatch.filter(names, "*.safetensors"):
        pickles = sorted(name for name in names if name.endswith(model_folder.PICKLES))
        if pickles:
            raise InputError(
                f"{shown}/{pickles[0]}: pickled weights are never loaded; save the model with safe_serialization=True",
                code="pickled-weights",
            )
        raise InputError(f"{shown}: holds no *.safetensors; put the model's weights there", code="incomplete-model")
    wanted = {name for pattern in PATTERNS for name in fnmatch.filter(names, pattern)}
    return sorted(name for name in wanted if not name.endswith((*model_folder.PICKLES, ".py")))


def choose_weight_files(names: list[str], folder: Path, shown: str) -> list[str]:
    """Return the names without weights that are there a second time; the index, if there is one, is in `folder`.

    Some repositories have them in another layout too (`consolidated.safetensors`). Raises InputError where it cannot be
    told which of two sets is meant: transformers would read one, and llama.cpp's converter both.
    """
    single, index = model_folder.SINGLE_FILE in names, model_folder.INDEX_FILE in names
    if single and index:
        indexed = model_folder.list_shards(folder / model_folder.INDEX_FILE)
        if not indexed & set(names):  # of a model that was saved here before, in shards
            index = False
            names = [name for name in names if name != model_folder.INDEX_FILE]
        elif indexed != {model_folder.SINGLE_FILE}:
            raise InputError(
                f"{shown}: holds two sets of weights, {model_folder.SINGLE_FILE} and the files that "
                f"{model_folder.INDEX_FILE} names; remove one of the two",
                code="weights-twice",
            )
    if index:
        return _select_indexed(names, folder / model_folder.INDEX_FILE, shown)
    if single:
        return [name for name in names if not name.endswith(".safetensors") or name == model_folder.SINGLE_FILE]
    return names


def check_text_file(file: Path, shown: str) -> None:
    """Raise InputError if a JSON file holds no object, or if it or a template begins with a byte-order mark.

    transformers and tokenizers do not read such a mark, or take it for a part of the text.
    """
    with file.open("rb") as content:
        if content.read(3) == b"\xef\xbb\xbf":
            raise InputError(
                f"{shown}: begins with a byte-order mark; save it as UTF-8 without one", code="byte-order-mark"
            )
    if file.suffix == ".json":
        read_json_object(file, shown=shown, remedy="copy the whole folder again")


def _select_indexed(names: list[str], index: Path, shown: str) -> list[str]:
    shards = model_folder.list_shards(index)
    if lacking := sorted(shards - set(names)):
        raise InputError(
            f"{shown}: holds no {lacking[0]}, which {model_folder.INDEX_FILE} names; give a complete model",
            code="incomplete-model",
        )
    return [name for name in names if not name.endswith(".safetensors") or name in shards]
