"""Run files: what is mirrored of a run, read from a folder with the files of its stages.

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
from lathe.common.metric_files import unwrap_list
from lathe.config.yaml_files import read_yaml
from lathe.provenance.lineage import digest_parameters

# The points of a curve by its name: (optimizer step, value), in the order of dvclive's file.
CurvePoints = dict[str, list[tuple[int, float]]]

CURVES = {"metrics/train/plots/metrics": "", "metrics/speed/plots/metrics": "speed/"}
VARYING = "speed/"  # prefix of the curves that differ when the same training is run again

CONFIGURATION = ("params.yaml", "presets.yaml", "dvc.lock")
MODEL_FILES = ("models/adapter", "models/gguf/README.md", "models/gguf/Modelfile")

_CONTEXT = "context.json"
_SIGNS = {">=": "at least", "<=": "at most", ">": "above", "<": "below", "*": "times", "+": "plus"}


@dataclass(frozen=True)
class Context:
    """Names of a run that its files do not have: those of Git, DVC and a search."""

    commit: str | None = None
    experiment: str | None = None
    study: str | None = None
    trial: str | None = None
    sampler: str | None = None

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> "Context":
        """Read the variables that `lathe search` and DVC set for stages."""
        return Context(
            experiment=environment.get("DVC_EXP_NAME") or None,
            study=environment.get("LATHE_STUDY") or None,
            trial=environment.get("LATHE_TRIAL") or None,
            sampler=environment.get("LATHE_SAMPLER") or None,
        )

    def write(self, folder: Path) -> None:
        """Write it next to the files."""
        (folder / _CONTEXT).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "Context":
        """Return the context that `write` wrote."""
        return Context(**read_json(folder / _CONTEXT))


class MirroredRun:
    """A run as trackers show it; its files are read when they are needed, once."""

    def __init__(self, folder: Path, context: Context) -> None:
        self.folder, self.context = folder, context

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Every parameter by its dotted key, without the section `tracking`, and those of the selected presets."""
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
        """The name of the run on the trackers' pages."""
        parameters = self.parameters
        return self.context.experiment or f"{parameters['model']}-{parameters['dataset']}-{self.digest[:6]}"

    @cached_property
    def tags(self) -> dict[str, str]:
        """The tags by which runs are found."""
        context = self.context
        tags = {
            "model": self.parameters["model"],
            "dataset": self.parameters["dataset"],
            "experiment": context.experiment,
            "study": context.study,
            "trial": context.trial,
            "sampler": context.sampler,
        }
        return {key: value for key, value in tags.items() if value is not None}

    @cached_property
    def curves(self) -> CurvePoints:
        """The points in dvclive's files."""
        return read_curves(self.folder)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Each number of metrics/evaluate outside of lists: `evaluate/validation/merged/exact_match`."""
        scores: dict[str, float] = {}
        for file in sorted((self.folder / "metrics/evaluate").glob("*.json")):
            if file.name == "summary.json":  # of the numbers in the other files
                continue
            for keys, value in dotted_keys.walk(unwrap_list(read_json(file))):
                if isinstance(value, int | float):
                    scores["/".join(("evaluate", file.stem, *map(_sanitize_name, keys)))] = float(value)
        return scores

    @property
    def last_step(self) -> int:
        """The step of the last points; 0 without a curve."""
        return max((points[-1][0] for points in self.curves.values() if points), default=0)

    @property
    def files(self) -> list[Path]:
        """The files that are sent with the run."""
        places = [self.folder / name for name in (*CONFIGURATION, *MODEL_FILES)]
        return [file for path in places for file in ([path] if path.is_file() else sorted(path.rglob("*")))]

    @cached_property
    def files_digest(self) -> str:
        """SHA-256 of the names and contents of `files`."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as content:
                digest.update(f"{file.relative_to(self.folder)} ".encode())
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()


def read_curves(root: Path, *, since: float = 0.0) -> CurvePoints:
    """Return the points of dvclive's files written after the time `since`, without an incomplete last line."""
    curves: CurvePoints = {}
    for folder, prefix in CURVES.items():
        for file in sorted((root / folder).rglob("*.tsv")):
            if file.stat().st_mtime >= since:
                name = prefix + file.relative_to(root / folder).with_suffix("").as_posix()
                curves[name] = _read_points(file)
    return curves


def find_unsent_points(known: Mapping[str, Mapping[int, float]], curves: CurvePoints) -> list[tuple[str, int, float]]:
    """Return each point, as (curve, step, value), of a step that is not known yet, in the order of steps."""
    points = [
        (name, step, value)
        for name, curve in curves.items()
        for step, value in dict(curve).items()
        if step not in known.get(name, {})
    ]
    return sorted(points, key=lambda point: point[1])


def contradicts(known: Mapping[str, Mapping[int, float]], curves: CurvePoints, *, whole: bool) -> bool:
    """Tell whether known points are of another run; `whole` if the curves are complete.

    Speeds differ in every run, and are ignored.
    """
    for name, points in known.items():
        if name.startswith(VARYING):
            continue
        own = dict(curves.get(name, ()))
        if any(own[step] != value if step in own else whole for step, value in points.items()):
            return True
    return False


def _read_points(file: Path) -> list[tuple[int, float]]:
    text = file.read_text(encoding="utf-8")
    rows = csv.reader(text[: text.rfind("\n") + 1].splitlines()[1:], delimiter="\t")
    return [(int(step), float(value)) for step, value in rows]


def _sanitize_name(name: str) -> str:
    """Return a name with characters that every tracker accepts: MLflow refuses the signs of gates."""
    for sign, word in _SIGNS.items():
        name = name.replace(sign, word)
    return re.sub(r"[^\w\-. ]", "_", name)
