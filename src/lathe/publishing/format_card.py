"""Card of a release in formats of other runtimes: how they are used, and the Hub's metadata of such a repository."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lathe.config.export_params import MLX, ONNX

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TOP = ""  # of a repository
GGUF_TAGS = ("gguf", "llama.cpp")


def set_metadata(data: "ModelCardData", formats: Sequence[str]) -> None:
    """Name library and tags of a repository that holds no GGUF."""
    [library, *_] = [_find_library(name) for name in formats]
    data.library_name = library
    kept = [tag for tag in data.tags or [] if tag not in GGUF_TAGS]
    data.tags = [*formats, *([library] if library not in formats else []), *kept]


def describe_formats(names: Mapping[str, str], formats: Sequence[str], repository: str) -> str:
    """Return a section on the formats of a repository; `names` are the folders that they are in, TOP for one alone."""
    lines = ["## Use" if TOP in names.values() else "## Other formats", ""]
    for name in formats:
        if names[name] != TOP:
            lines += [f"`{names[name]}`:", ""]
        lines += ["```", _describe_use(name, names[name], repository), "```", ""]
    return "\n".join(lines)


def replace_use(text: str, section: str) -> str:
    """Put a section in place of how llama.cpp and Ollama use a GGUF, where there is none."""
    text = re.sub(r"^\*\*.*has the best .*\nthe `Modelfile` is for it\.\n\n?", "", text, flags=re.MULTILINE)
    text = text.replace("quantized to GGUF for [llama.cpp](https://github.com/ggml-org/llama.cpp)", "exported")
    before, _, rest = text.partition("## Use\n")
    _, _, after = rest.partition("## Training\n")
    return f"{before}\n{section}\n## Training\n{after}"


def _find_library(name: str) -> str:
    return "onnxruntime-genai" if name in ONNX else "mlx" if name in MLX else "transformers"


def _describe_use(name: str, folder: str, repository: str) -> str:
    is_top = folder == TOP
    download = f"hf download {repository} --local-dir model" + ("" if is_top else f" --include '{folder}*'")
    path = "model" if is_top else f"model/{folder.rstrip('/')}"
    if name in ONNX:
        return f"{download}\npython -c \"import onnxruntime_genai as og; model = og.Model('{path}')\""
    model = repository if is_top else path
    command = f"mlx_lm.chat --model {model}" if name in MLX else f"vllm serve {model}"
    return command if is_top else f"{download}\n{command}"
