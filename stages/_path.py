"""Run this checkout's code, with the packages that `make setup` installed and threads that share the machine.

A queued or temporary experiment runs in a checkout of its own, while the environment's editable install points to
the main one: `src/` of this very checkout goes first on the import path. No other file edits `sys.path`.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# `.venv/bin/dvc repro` without activating finds some other python: go on with the environment's. A temporary
# experiment's checkout is below the main one's .dvc. No other folder above is looked into: whoever may write to /tmp
# could put an environment there, for every checkout below it.
if importlib.util.find_spec("ruamel") is None:
    above = next((folder.parents for folder in ROOT.parents if folder.name == ".dvc"), ())
    for folder in (ROOT, *(folder for folder in above if (folder / "presets.yaml").is_file())):
        python = folder / ".venv/bin/python"
        if python.exists() and Path(sys.executable) != python:
            os.execv(python, [str(python), *sys.argv])
    sys.exit(f"error: {sys.executable} lacks Lathe's packages; run `make setup`, then `source .venv/bin/activate`")

# Threads that wait sleep instead of spinning: on cores that something else wants too, a training step with spinning
# threads took up to 3 s instead of 0.1 s. Read once, when torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(ROOT / "src"))
