"""Paths of the checkout, and files and folders that appear complete or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The checkout this very file belongs to: a queued or temporary experiment runs in a checkout of its own.
ROOT = Path(__file__).resolve().parents[3]

# The checkout that the user works in: temporary experiments run below its .dvc, without what Git ignores.
# Those of the classifier run below the one in its folder.
_DVC = next((path for path in ROOT.parents if path.name == ".dvc"), ROOT / ".dvc")
MAIN = next((path for path in _DVC.parents if (path / "presets.yaml").exists()), ROOT)

PARAMS = ROOT / "params.yaml"
PRESETS = ROOT / "presets.yaml"

DATA_LOCAL = ROOT / "data/local"
DATA_RAW = ROOT / "data/raw"
DATA_PROCESSED = ROOT / "data/processed"
DATA_GENERATED = ROOT / "data/generated"
DATA_JUDGED = ROOT / "data/judged"
DATA_BENCHMARK = ROOT / "data/benchmark"
DATA_SAMPLED = ROOT / "data/sampled"
DATA_SCORED = ROOT / "data/scored"

MODELS_LOCAL = ROOT / "models/local"
MODEL_BASE = ROOT / "models/base"
MODEL_ENCODER = ROOT / "models/encoder"
MODEL_ADAPTER = ROOT / "models/adapter"
MODEL_MERGED = ROOT / "models/merged"
IMATRIX = ROOT / "models/imatrix"
GGUF = ROOT / "models/gguf"
MODELS_EXPORTED = ROOT / "models/exported"

REWARDS = ROOT / "rewards"
METRICS = ROOT / "metrics"
CLASSIFIER = ROOT / "classify"  # the pipeline of the classifier, with folders of its own
CLASSIFIER_PARAMS = CLASSIFIER / "params.yaml"
CLASSIFIER_METRICS = CLASSIFIER / "metrics"
LLAMA_CPP = MAIN / ".llama.cpp"
SCRATCH = MAIN / ".scratch"  # what outlives a stage that was killed; known to neither Git nor DVC

UNUSED = "unused.txt"  # the note in an output folder that a run has no use for


def mark_unused(folder: Path, reason: str) -> None:
    """Write a note into an output folder that a run has no use for: DVC warns of an empty one at every command."""
    (folder / UNUSED).write_text(f"{reason}\n", encoding="utf-8")


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Yield a sibling path to write to; it becomes `target` on success and is removed on failure."""
    partial = _partial(target)
    with _removed_on_failure(partial):
        yield partial
        partial.replace(target)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; it replaces `target` on success and is removed on failure."""
    partial = _partial(target)
    partial.mkdir()
    with _removed_on_failure(partial):
        yield partial
        _remove(target)
        partial.rename(target)


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(partial)  # a failed write does not say what to
        _remove(partial)
        raise


def link(source: Path, target: Path) -> None:
    """Make `target` a hard link to the file that `source` names, or a copy of it on another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _partial(target: Path) -> Path:
    # A fixed name, so that the next run clears away what a killed one left.
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    return partial


def remove_unless(folder: Path, is_kept: Callable[[Path], bool]) -> None:
    """Remove the files and subfolders of a folder, where it exists, that are not to be kept."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if not is_kept(path):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
