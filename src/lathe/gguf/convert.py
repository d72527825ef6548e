"""Conversion of safetensors to GGUF, by llama.cpp's own converter."""

from pathlib import Path

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.gguf.converter_process import run_converter

PREDICTING_KINDS = ("qwen3_5", "qwen3_next")  # beginnings of model_type

# What the converter's --outtype takes.
OUT_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")


def convert(model: Path, out: Path, *, outtype: str, llama_cpp: Path, metadata: dict[str, str]) -> None:
    """Write the safetensors model in the folder `model` to the GGUF file `out`, with llama.cpp's own converter.

    `llama_cpp` is a folder with convert_hf_to_gguf.py; `outtype` one of `OUT_TYPES`. Every key of `metadata`
    (`lathe.dataset_digest`, `general.name`, …) is added as text, in place of the converter's own if it has
    one. The bytes depend only on the files, the arguments and the last part of `model` (the default of
    `general.name`). Nothing is downloaded and no code of the model is run. The caller makes the file appear
    completely or not at all.

    Raises InputError in one line if the converter is missing or refuses the model; its output is logged at
    debug level.
    """
    if outtype not in OUT_TYPES:
        raise InputError(
            f"{outtype!r} is no output type; {did_you_mean(outtype, list(OUT_TYPES))}", code="unknown-output-type"
        )
    _require_converter(llama_cpp)
    # The converter would make a file without tensors, or read a pickle.
    if (
        (model / "config.json").is_file()
        and not any(model.glob("model*.safetensors"))
        and not (model / "model.safetensors.index.json").is_file()
    ):
        raise InputError(
            f"{model}: no model*.safetensors; the folder must hold the weights, as safetensors", code="incomplete-model"
        )
    _convert(model, out, ["--outtype", outtype], llama_cpp=llama_cpp, metadata=metadata, shown=str(model))


def convert_vocabulary(model: Path, out: Path, *, llama_cpp: Path, shown: str) -> None:
    """Write the vocabulary, the configuration and the chat template of a model to a GGUF file without tensors.

    It takes seconds, whatever the size of the model, whose weights are not read. Raises InputError as `convert` does;
    `shown` is what the message calls the model.
    """
    _convert(model, out, ["--vocab-only"], llama_cpp=llama_cpp, metadata={}, shown=shown)


def convert_projector(model: Path, out: Path, *, llama_cpp: Path, metadata: dict[str, str]) -> None:
    """Write the part of a model that reads images to the GGUF file `out`, which llama.cpp loads beside the text's.

    Raises InputError as `convert` does, also for a model of text alone.
    """
    _convert(model, out, ["--mmproj", "--outtype", "f16"], llama_cpp=llama_cpp, metadata=metadata, shown=str(model))


def _convert(
    model: Path, out: Path, options: list[str], *, llama_cpp: Path, metadata: dict[str, str], shown: str
) -> None:
    _require_converter(llama_cpp)
    if not (model / "config.json").is_file():
        raise InputError(
            f"{shown}: no config.json; the folder must hold a model in Hugging Face format", code="incomplete-model"
        )
    arguments = [str(model.absolute()), "--outfile", str(out.absolute()), *options]
    if "--mmproj" not in options and _lacks_prediction_layers(model):
        arguments.append("--no-mtp")
    if refusal := run_converter(llama_cpp, "convert_hf_to_gguf.py", metadata, arguments, out):
        raise InputError(
            f"{shown}: llama.cpp's converter refuses it: {refusal} (LATHE_LOG_LEVEL=debug shows its whole output)",
            code="conversion-refused",
        )


def _require_converter(llama_cpp: Path) -> None:
    if not (llama_cpp / "convert_hf_to_gguf.py").is_file():
        raise InputError(
            f"{llama_cpp}: no convert_hf_to_gguf.py; run `make setup`, or name a llama.cpp checkout in "
            f"convert.llama_cpp_dir",
            code="no-converter",
        )


def _lacks_prediction_layers(model: Path) -> bool:
    """Tell whether a model of a kind that predicts several tokens comes without the layers for that (MTP).

    transformers neither loads nor saves them; the converter would write a file that llama.cpp cannot load.
    """
    from lathe.models import model_folder

    config = model_folder.read_json(model / "config.json")
    kind = str(model_folder.get_text_config(config).get("model_type"))
    if not kind.startswith(PREDICTING_KINDS):
        return False
    return not any("mtp." in name for name in model_folder.open_model(model).tensors)
