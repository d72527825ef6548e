"""Converter process: one of llama.cpp's converter scripts, run offline in a process of its own."""

import json
import logging
import os
import sys
from pathlib import Path
from subprocess import DEVNULL

from lathe.common import operating_system, paths
from lathe.gguf.program_errors import extract_reason, raise_disk_error

logger = logging.getLogger(__name__)


def run_converter(
    llama_cpp: Path, script: str, metadata: dict[str, str], arguments: list[str], out: Path
) -> str | None:
    """Run one of llama.cpp's converters; return why it refused, or None; a failed `out` is removed."""
    command = [
        sys.executable,
        "-m",
        "lathe.gguf.run_converter",
        str(llama_cpp.absolute()),
        script,
        json.dumps(metadata),
    ]
    command += arguments
    done = operating_system.run_command(
        command,
        env=_converter_environment(),
        stdin=DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    logger.debug("%s\n%s%s", " ".join(command), done.stdout, done.stderr)
    if done.returncode == 0:
        return None
    raise_disk_error(done.stderr, out)
    out.unlink(missing_ok=True)
    return extract_reason(done.stderr)


def _converter_environment() -> dict[str, str]:
    # PYTHONPATH: this checkout's own lathe, not the installed one. NO_LOCAL_GGUF would make it use another
    # gguf-py.
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_LOCAL_GGUF", "HF_TOKEN")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**kept, **offline, "PYTHONPATH": str(paths.ROOT / "src"), "PYTHONUTF8": "1"}
