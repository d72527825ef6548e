"""Vocabulary of a model as llama.cpp has it, before any weights are converted: a GGUF file without tensors."""

from hashlib import sha256
from pathlib import Path

from lathe.common import paths
from lathe.common.scratch import hash_file
from lathe.gguf.convert import convert_vocabulary

KEPT_FILES = 4


def get_vocabulary(model: Path, *, llama_cpp: Path, shown: str) -> Path:
    """Return a GGUF file with the vocabulary of the model in the folder `model`, made by llama.cpp's converter.

    It is made once for the same tokenizer, configuration and converter, and kept in the scratch folder. `shown` is what
    a message calls the model. Raises InputError where the converter is missing, or refuses the model: its architecture,
    its tokenizer.
    """
    folder = paths.SCRATCH / "vocabulary"
    file = folder / f"{_compute_digest(model, llama_cpp)}.gguf"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with paths.replace_file(file) as partial:
            convert_vocabulary(model, partial, llama_cpp=llama_cpp, shown=shown)
    for old in sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_mtime)[:-KEPT_FILES]:
        old.unlink(missing_ok=True)
    return file


def _compute_digest(model: Path, llama_cpp: Path) -> str:
    texts = [path for path in model.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    code = [*llama_cpp.glob("convert_hf_to_gguf.py"), *llama_cpp.glob("conversion/*.py")]
    digest = sha256()
    for file in (*sorted(texts), *sorted(code)):
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()[:32]
