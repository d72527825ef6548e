"""Conversion of safetensors to GGUF, by llama.cpp's own converter."""

from pathlib import Path

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.gguf.converter_process import run_converter

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
    if not (llama_cpp / "convert_hf_to_gguf.py").is_file():
        raise InputError(
            f"{llama_cpp}: no convert_hf_to_gguf.py; run `make setup`, or name a llama.cpp checkout in "
            f"convert.llama_cpp_dir",
            code="no-converter",
        )
    if not (model / "config.json").is_file():
        raise InputError(
            f"{model}: no config.json; the folder must hold a model in Hugging Face format", code="incomplete-model"
        )
    # The converter would make a file without tensors, or read a pickle.
    if not any(model.glob("model*.safetensors")) and not (model / "model.safetensors.index.json").is_file():
        raise InputError(
            f"{model}: no model*.safetensors; the folder must hold the weights, as safetensors", code="incomplete-model"
        )
    arguments = [str(model.absolute()), "--outfile", str(out.absolute()), "--outtype", outtype]
    if refusal := run_converter(llama_cpp, "convert_hf_to_gguf.py", metadata, arguments, out):
        raise InputError(
            f"{model}: llama.cpp's converter refuses it: {refusal} (LATHE_LOG_LEVEL=debug shows its whole output)",
            code="conversion-refused",
        )
