"""llama.cpp's own Jinja engine, by which its server and its other programs render chat templates.

It is in none of the libraries that Python can load, so `make setup` builds a small program of its sources
(`render_template.cpp`), if the machine has a C++ compiler.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lathe.common import operating_system

# Below the folder of llama.cpp.
SOURCES = (
    "common/jinja",
    "common/json.cpp",
    "common/json.h",
    "common/unicode.cpp",
    "common/unicode.h",
    "ggml/include/ggml.h",
    "vendor/nlohmann/json.hpp",
)
PROGRAM = "bin/render-template"
MAIN = Path(__file__).with_name("render_template.cpp")
COMPILERS = ("c++", "g++", "clang++")

# A template is a program of whoever made it.
LIMIT_SECONDS = 20.0


class Rendered(NamedTuple):
    """What the engine made of a template: its text, or why there is none."""

    text: str | None
    error: str | None


def find_engine(llama_cpp: Path) -> Path | None:
    """Return the program in a folder of llama.cpp; None if it has not been built."""
    program = llama_cpp / PROGRAM
    return program if program.is_file() else None


def build_engine(llama_cpp: Path) -> str | None:
    """Build the program from the sources in a folder of llama.cpp; return why that is not possible, or None."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    sources = [str(MAIN), *(str(llama_cpp / name) for name in SOURCES if name.endswith(".cpp"))]
    sources += sorted(map(str, llama_cpp.glob("common/jinja/*.cpp")))
    included = [f"-I{llama_cpp / folder}" for folder in ("common", "vendor", "ggml/include")]
    program = llama_cpp / PROGRAM
    program.parent.mkdir(exist_ok=True)
    partial = program.with_suffix(".partial")
    command = [*compiler, "-std=c++17", "-O1", *included, *sources, "-o", str(partial)]
    try:
        done = operating_system.run_command(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return f"{compiler[0]}: {error.strerror}"
    if done.returncode == 0:
        partial.replace(program)
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no reason"]
    return f"{compiler[0]} ends with exit code {done.returncode}: {errors[0].strip()[:300]}"


def render_with_engine(
    engine: Path, template: str, contexts: Sequence[Mapping[str, Any]], *, unix_time: int
) -> list[Rendered]:
    """Render a template for each of the `contexts`, its variables by name.

    `unix_time` (seconds, UTC) is what a template is told that asks for the date.
    """
    request = json.dumps({"template": template, "time": unix_time, "contexts": list(contexts)})
    try:
        done = operating_system.run_command(
            [str(engine)],
            input=request,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=LIMIT_SECONDS,
            env={"TZ": "UTC"},
        )
    except subprocess.TimeoutExpired:
        return [Rendered(None, f"it does not end within {LIMIT_SECONDS:g} seconds")] * len(contexts)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [Rendered(None, f"it crashes: {reason[-1][:300]}")] * len(contexts)
    return [Rendered(answer.get("text"), _shorten(answer.get("error"))) for answer in json.loads(done.stdout)]


def _shorten(error: str | None) -> str | None:
    """Return an error of the engine, which shows the source around it, in one line."""
    if error is None:
        return None
    place = re.search(r"line \d+", error)
    reason = " ".join(error.rpartition("Error: ")[2].split())[:300]
    return f"{place[0]}: {reason}" if place else reason
