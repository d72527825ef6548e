"""Environments of the export: which packages a format needs, which Python has them, and which models they know.

Nothing is imported here of what is looked for: it takes seconds, and an environment of its own cannot be imported.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.export_params import COMPRESSED, ONNX, FormatExport

# What a format is made and measured with; the first names its runtime.
PACKAGES = {
    **dict.fromkeys(ONNX, ("onnxruntime-genai", "onnxruntime", "onnx-ir")),
    "mlx": ("mlx-lm", "mlx"),
    "mlx_4bit": ("mlx-lm", "mlx"),
    **dict.fromkeys(COMPRESSED, ("llmcompressor", "compressed-tensors", "transformers", "torch")),
}

MOST_SHOWN = 300  # characters of a program's last line

# No module is looked for in the working folder.
_PYTHON = {"PYTHONUTF8": "1", "PYTHONSAFEPATH": "1"}

# What these programs need of the environment: no key of a provider or remote.
_PASSED_ON = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CC", "CXX")
_PASSED_ON_PREFIXES = ("LC_", "XDG_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "TORCH", "OMP_", "MKL_", "OPENBLAS_")


def find_python(name: str, settings: FormatExport) -> Path:
    """Return the Python that has the packages of a format. Raises InputError if it is not there."""
    if name not in COMPRESSED:
        return Path(sys.executable)
    python = paths.MAIN / settings.llmcompressor_python  # of a temporary experiment too
    if not python.is_file() or not os.access(python, os.X_OK):
        raise InputError(
            f"export.llmcompressor_python is {settings.llmcompressor_python}: no program is there, and export.formats "
            f"lists {name}; `make llmcompressor` makes it, or take {name} off the list",
            code="no-llmcompressor",
        )
    return python


def read_versions(name: str, python: Path) -> dict[str, str]:
    """Return the versions of a format's packages; they are not imported. Raises InputError if one is missing."""
    program = (
        "import json, sys; from importlib import metadata\n"
        "found = {each.metadata['Name'].lower().replace('_', '-'): each.version for each in metadata.distributions()}\n"
        "print(json.dumps({name: found.get(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [python, "-c", program, *PACKAGES[name]],
        env=choose_environment(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES[name])
    if done.returncode == 0:
        versions |= json.loads(done.stdout)
    if missing := [package for package, version in versions.items() if version is None]:
        remedy = "`make llmcompressor`" if name in COMPRESSED else "`make setup EXTRAS=export`"
        raise InputError(
            f"export.formats lists {name}, and {missing[0]} is not installed in the environment of {python}; "
            f"{remedy}, or take {name} off the list",
            code="missing-extra",
        )
    return {package: str(version) for package, version in versions.items()}


def choose_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a program of a format: it has all that it needs on this disk."""
    kept = {
        name: value for name, value in environment.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", **_PYTHON}


def read_last_line(log: Path) -> str:
    """Return the last line of a program's log that says something."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    shown = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return "".join(character if character.isprintable() else " " for character in shown)[:MOST_SHOWN]


def check_architecture(name: str, folder: Path) -> None:
    """Raise InputError if the tool of a format names no model like the one in a folder among those that it exports."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if name in ONNX:
        [wanted, *_] = config.get("architectures") or [""]
        is_known = _is_quoted(wanted, "onnxruntime_genai", "models/builder.py")
    elif name not in COMPRESSED:
        wanted = config.get("model_type", "")
        is_known = _has_module("mlx_lm", f"models/{wanted}.py") or _is_quoted(wanted, "mlx_lm", "utils.py")
    else:
        return  # llmcompressor takes the linear layers of whatever transformers loads
    if not is_known:
        raise InputError(
            f"export.formats lists {name}, and {PACKAGES[name][0]} exports no {wanted or 'model of unknown kind'}; "
            f"take {name} off the list, or another base",
            code="unsupported-architecture",
        )


def _find_file(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    folders: Sequence[str] = (spec and spec.submodule_search_locations) or []
    return next((Path(folder) / file for folder in folders if (Path(folder) / file).is_file()), None)


def _has_module(package: str, file: str) -> bool:
    return _find_file(package, file) is not None


def _is_quoted(name: str, package: str, file: str) -> bool:
    """Tell whether the source of a module names something in quotes; neither tool has a list of what it exports."""
    found = _find_file(package, file)
    return bool(name) and found is not None and f'"{name}"' in found.read_text(encoding="utf-8")
