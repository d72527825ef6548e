"""The Python that each program runs in: Lathe's own, or one made for a peer that wants other versions."""

import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
MADE_IN = BENCHMARKS.parent / ".bench"
APART = {"LLaMA-Factory": "llamafactory", "mergekit": "mergekit"}  # requirements-NAME.txt lists what each needs


def python_of(program: str) -> str:
    """Return the Python to run a program with; the first time, a peer's own takes a minute or two to install."""
    return _make_environment(APART[program]) if program in APART else sys.executable


def _make_environment(name: str) -> str:
    requirements, folder = BENCHMARKS / f"requirements-{name}.txt", MADE_IN / name
    python, ready = folder / "bin/python", folder / ".ready"
    wanted = requirements.read_text(encoding="utf-8")
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return str(python)
    sys.stderr.write(f"installing what {requirements.name} lists into {folder}\n")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--quiet"]
    # All at once, so that dependencies are chosen for this torch and none brings another.
    subprocess.run([*pip, "install", "--requirement", str(requirements)], check=True)
    # Their compiled parts are of another build of torch and do not load beside this one. Nothing here needs them:
    # transformers does without torchvision, and LLaMA-Factory imports torchaudio for audio alone.
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio"], check=True)
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (packages / "torchaudio.py").write_text('"""An empty module in place of torchaudio."""\n', encoding="utf-8")
    ready.write_text(wanted, encoding="utf-8")
    return str(python)
