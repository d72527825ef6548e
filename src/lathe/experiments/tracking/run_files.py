"""What is mirrored of a run, read from a folder with the files that its stages left.

The folder is a copy of a workspace or of a commit (`run_copies`), with `params.yaml`, `presets.yaml`,
`dvc.lock`, `metrics/` and, as far as there are any, `models/adapter/` and the model card, each at its place in the
repository.
"""

import csv
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lathe.common import dotted_keys
from lathe.common.json_files import read_json
from lathe.config.yaml_files import read_yaml
from lathe.provenance.lineage import digest_parameters

# Points of a curve by its name: (optimizer step, value), in the order of dvclive's file.
Curves = dict[str, list[tuple[int, float]]]

CURVES = {"metrics/train/plots/metrics": "", "metrics/speed/plots/metrics": "speed/"}
VARYING = "speed/"  # what the names of curves begin with that differ when the same training is run again

CONFIGURATION = ("params.yaml", "presets.yaml", "dvc.lock")
MODEL_FILES = ("models/adapter", "models/gguf/README.md", "models/gguf/Modelfile")

_CONTEXT = "context.json"
_SIGNS = {">=": "at least", "<=": "at most", ">": "above", "<": "below", "*": "times", "+": "plus"}


@dataclass(frozen=True)
class Context:
    """What the files do not say of their run: the names that Git, DVC and a search have for it."""

    commit: str | None = None
    experiment: str | None = None
    study: str | None = None
    trial: str | None = None
    sampler: str | None = None

    @staticmethod
    def of_search(environment: Mapping[str, str]) -> "Context":
        """Return what `lathe search` and DVC tell the stages that they run."""
        return Context(
            experiment=environment.get("DVC_EXP_NAME") or None,
            study=environment.get("LATHE_STUDY") or None,
            trial=environment.get("LATHE_TRIAL") or None,
            sampler=environment.get("LATHE_SAMPLER") or None,
        )

    def write(self, folder: Path) -> None:
        """Write it beside the files."""
        (folder / _CONTEXT).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "Context":
        """Return what `write` wrote."""
        return Context(**read_json(folder / _CONTEXT))


class Record:
    """A run as trackers show it; everything is read when it is asked for, and once."""

    def __init__(self, folder: Path, context: Context) -> None:
        self.folder, self.context = folder, context

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Every parameter by its dotted key, where it is mirrored to aside, and those of the chosen presets."""
        tree, presets = (read_yaml(self.folder / name) for name in CONFIGURATION[:2])
        tree = {key: value for key, value in tree.items() if key != "tracking"}
        chosen = {key: presets[f"{key}s"][tree[key]] for key in ("model", "dataset")}
        return dotted_keys.flatten({**tree, "presets": chosen})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the parameters."""
        return digest_parameters(self.parameters)

    @property
    def name(self) -> str:
        """What people call it."""
        parameters = self.parameters
        return self.context.experiment or f"{parameters['model']}-{parameters['dataset']}-{self.digest[:6]}"

    @cached_property
    def tags(self) -> dict[str, str]:
        """What runs are searched by."""
        context = self.context
        found = {
            "model": self.parameters["model"],
            "dataset": self.parameters["dataset"],
            "experiment": context.experiment,
            "study": context.study,
            "trial": context.trial,
            "sampler": context.sampler,
        }
        return {key: value for key, value in found.items() if value is not None}

    @cached_property
    def curves(self) -> Curves:
        """The points that dvclive wrote."""
        return read_curves(self.folder)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Each number of metrics/evaluate but those in lists: `evaluate/validation/merged/exact_match`."""
        found: dict[str, float] = {}
        for file in sorted((self.folder / "metrics/evaluate").glob("*.json")):
            for keys, value in dotted_keys.walk(read_json(file)):
                if isinstance(value, int | float):
                    found["/".join(("evaluate", file.stem, *map(_spelt, keys)))] = float(value)
        return found

    @property
    def last_step(self) -> int:
        """The step that the last points are of; 0 without a curve."""
        return max((points[-1][0] for points in self.curves.values() if points), default=0)

    @property
    def files(self) -> list[Path]:
        """The files that are kept with the run, below its folder."""
        found = [self.folder / name for name in (*CONFIGURATION, *MODEL_FILES)]
        return [file for path in found for file in ([path] if path.is_file() else sorted(path.rglob("*")))]

    @cached_property
    def files_digest(self) -> str:
        """SHA-256 of the names and contents of `files`."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as content:
                digest.update(f"{file.relative_to(self.folder)} ".encode())
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()


def read_curves(root: Path, *, since: float = 0.0) -> Curves:
    """Return the points of dvclive's files written after the time `since`; a line half written is left out."""
    found: Curves = {}
    for folder, prefix in CURVES.items():
        for file in sorted((root / folder).rglob("*.tsv")):
            if file.stat().st_mtime >= since:
                name = prefix + file.relative_to(root / folder).with_suffix("").as_posix()
                found[name] = _points(file)
    return found


def missing(known: Mapping[str, Mapping[int, float]], curves: Curves) -> list[tuple[str, int, float]]:
    """Return each point, as (curve, step, value), of a step that is not known yet; those of one step side by side."""
    found = [
        (name, step, value)
        for name, points in curves.items()
        for step, value in dict(points).items()
        if step not in known.get(name, {})
    ]
    return sorted(found, key=lambda point: point[1])


def contradicts(known: Mapping[str, Mapping[int, float]], curves: Curves, *, whole: bool) -> bool:
    """Tell whether known points are of another run; `whole` where the curves have come to their end.

    Speeds differ whenever something is run, and tell nothing.
    """
    for name, points in known.items():
        if name.startswith(VARYING):
            continue
        mine = dict(curves.get(name, ()))
        if any(mine[step] != value if step in mine else whole for step, value in points.items()):
            return True
    return False


def _points(file: Path) -> list[tuple[int, float]]:
    text = file.read_text(encoding="utf-8")
    rows = csv.reader(text[: text.rfind("\n") + 1].splitlines()[1:], delimiter="\t")
    return [(int(step), float(value)) for step, value in rows]


def _spelt(name: str) -> str:
    """Return a name in characters that every tracker takes: a gate has signs that MLflow refuses."""
    for sign, word in _SIGNS.items():
        name = name.replace(sign, word)
    return re.sub(r"[^\w\-. ]", "_", name)
