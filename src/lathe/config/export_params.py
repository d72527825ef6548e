"""Parameters of export: the formats of other runtimes that the merged model is shipped in, beside the GGUF files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import field_validator

from lathe.common.paths import remove_unless
from lathe.common.text import did_you_mean
from lathe.config.artifacts import UNQUANTIZED
from lathe.config.base import Name, Positive, Section, entry

ONNX, MLX, COMPRESSED = ("onnx", "onnx_int4"), ("mlx", "mlx_4bit"), ("fp8", "awq")
FORMATS = (*ONNX, *MLX, *COMPRESSED)
CALIBRATED = ("awq",)


class FormatExport(Section):
    """Export of the merged model to formats of other runtimes: ONNX Runtime, MLX, vLLM."""

    formats: list[Name] = entry(f"formats, each a folder in models/exported: any of {', '.join(FORMATS)}; []: none")
    calibration_rows: Positive = entry("training rows that awq is calibrated with", "rows")
    llmcompressor_python: Name = entry(
        "Python of the environment that llmcompressor is installed in, for the formats fp8 and awq"
    )

    @field_validator("formats")
    @classmethod
    def _check_formats(cls, formats: list[str]) -> list[str]:
        for name in formats:
            if name not in FORMATS:
                raise ValueError(f"{name!r} is no format; {did_you_mean(name, list(FORMATS))}")
            if formats.count(name) > 1:
                raise ValueError(f"lists {name!r} twice; name each format once")
        return formats


def list_gguf_types(artifacts: Iterable[str]) -> list[str]:
    """Return those of an evaluation's artifacts that are GGUF files of a quantization type."""
    return [name for name in artifacts if name not in (*UNQUANTIZED, *FORMATS)]


def remove_unlisted_formats(folder: Path, formats: Sequence[str]) -> None:
    """Remove the files and subfolders that are named for a format which is not in `formats`.

    DVC keeps them, as those of a quantization type (`lathe.config.artifacts.remove_unlisted_types`).
    """
    remove_unless(folder, lambda path: path.stem not in FORMATS or path.stem in formats)
