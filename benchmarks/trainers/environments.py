"""The Python that each trainer runs in: Lathe's own, or one made for a peer that wants other versions."""

import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
REQUIREMENTS = BENCHMARKS / "requirements-llamafactory.txt"
LLAMAFACTORY = BENCHMARKS.parent / ".bench/llamafactory"


def python_of(trainer: str) -> str:
    """Return the Python to run a trainer with; the first time, LLaMA-Factory's takes a minute or two to install."""
    return _llamafactory() if trainer == "LLaMA-Factory" else sys.executable


def _llamafactory() -> str:
    python, ready = LLAMAFACTORY / "bin/python", LLAMAFACTORY / ".ready"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return str(python)
    sys.stderr.write(f"installing LLaMA-Factory into {LLAMAFACTORY}\n")
    shutil.rmtree(LLAMAFACTORY, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(LLAMAFACTORY)], check=True)
    pip = [str(python), "-m", "pip", "--quiet"]
    # Both at once, so that its dependencies are chosen for this torch and none brings another.
    subprocess.run([*pip, "install", "--requirement", str(REQUIREMENTS)], check=True)
    # Their compiled parts are of another build of torch and do not load beside this one. Nothing here needs them:
    # transformers does without torchvision, and LLaMA-Factory imports torchaudio for audio alone.
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio"], check=True)
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (packages / "torchaudio.py").write_text('"""An empty module in place of torchaudio."""\n', encoding="utf-8")
    ready.write_text(wanted, encoding="utf-8")
    return str(python)
