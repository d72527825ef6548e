"""Conversion of the merged model to a format of another runtime, by that runtime's own program.

Each format is made in a process of its own: of this environment, or of the one that llmcompressor has.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lathe.common.code_closure import SOURCE
from lathe.common.errors import InputError
from lathe.common.operating_system import run_command
from lathe.config.export_params import COMPRESSED, ONNX
from lathe.export.environments import choose_environment, read_last_line

COMPRESS = "lathe.export.compress"
MLX_GROUP_SIZE = 64  # weights that share a scale
LINEAGE_FILE = "lineage.json"

# Not of the weights: what the runtimes read beside them, by which chats are rendered and tokenized as in training.
_COMPANIONS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_LICENCES = ("LICENSE*", "NOTICE*")


def convert(
    name: str, python: Path, merged: Path, out: Path, *, rows: Sequence[Sequence[int]], scratch: Path, log: Path
) -> None:
    """Write the merged model in a format, with its tokenizer, to the empty folder `out`.

    `rows` are token ids of training rows, which awq is calibrated with. `scratch` is an empty folder for files in
    between, and `log` gets what the program prints. Raises InputError with its last line if it fails.
    """
    made = scratch / "made"
    calibration = scratch / "rows.json"
    calibration.write_text(json.dumps([list(row) for row in rows]), encoding="utf-8")
    command = build_command(name, python, merged, made, scratch=scratch, calibration=calibration)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as written:
        done = run_command(
            command,
            env={**choose_environment(os.environ), "PYTHONPATH": str(SOURCE)},
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            cwd=scratch,
        )
    if done.returncode or not made.is_dir():
        raise InputError(
            f"export {name}: {' '.join(command[1:4])} has ended with exit code {done.returncode}: "
            f"{read_last_line(log)}; see {log}, or take {name} off export.formats",
            code="export-fails",
        )
    for file in sorted(path for path in made.rglob("*") if path.is_file()):
        target = out / file.relative_to(made)
        if file.name in ("README.md", "recipe.yaml"):
            continue  # the card of a model that is somebody else's, and the recipe with a date in it
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, target)
        target.chmod(0o644)
    copy_companions(merged, out)


def build_command(name: str, python: Path, merged: Path, made: Path, *, scratch: Path, calibration: Path) -> list[str]:
    """Return the command that writes a format to the folder `made`, which is not there yet."""
    if name in ONNX:
        # fmt: off
        return [
            str(python), "-m", "onnxruntime_genai.models.builder", "--input", str(merged), "--output", str(made),
            "--precision", "int4" if name == "onnx_int4" else "fp32", "--execution_provider", "cpu",
            "--cache_dir", str(scratch / "cache"), "--extra_options", "hf_token=false",
        ]
        # fmt: on
    if name in COMPRESSED:
        return [str(python), "-m", COMPRESS, name, str(merged), str(made), str(calibration)]
    command = [str(python), "-m", "mlx_lm", "convert", "--hf-path", str(merged), "--mlx-path", str(made)]
    if name == "mlx_4bit":
        command += ["--quantize", "--q-bits", "4", "--q-group-size", str(MLX_GROUP_SIZE)]
    return command


def copy_companions(merged: Path, out: Path) -> None:
    """Copy tokenizer, chat template and licence as they are beside the merged weights, in place of rewritten ones.

    A file that the runtime alone has stays, such as a tokenizer.json that was made of a tokenizer.model.
    """
    for pattern in (*_COMPANIONS, *_LICENCES):
        for file in merged.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
