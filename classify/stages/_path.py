"""Run this checkout's code, as stages/_path.py does for the main pipeline."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "stages/_path.py"))
