"""The two pipelines: which parameters each has, where, and how DVC names it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.config import classifier_config, load
from lathe.config.base import Section
from lathe.config.classifier_params import ClassifierParams
from lathe.config.params import Params


@dataclass(frozen=True)
class Pipeline:
    """A dvc.yaml with its parameters and recipes.

    `folder` is where they are, from the root; empty for the main one. `read` takes a file of parameters.
    """

    folder: str
    section: type[Section]
    read: Callable[[Path], Any]

    @property
    def params(self) -> Path:
        """The file of its parameters."""
        return paths.CLASSIFIER_PARAMS if self.folder else paths.PARAMS

    @property
    def params_name(self) -> str:
        """The name of that file in messages and for DVC, from the root."""
        return f"{self.folder}/params.yaml" if self.folder else self.params.name

    @property
    def recipes(self) -> Path:
        """The folder of its recipes."""
        return paths.ROOT / self.folder / "experiments"

    @property
    def dvc_options(self) -> list[str]:
        """The options of `dvc` before its command. The classifier's folder is a DVC repository of its own: with one for
        both, `dvc exp apply` and `dvc checkout` would fail where one of the two pipelines has not been run.
        """
        return build_dvc_options(self.folder)


def build_dvc_options(folder: str) -> list[str]:
    """Return the options of `dvc` for the pipeline of a folder; see `Pipeline.dvc_options`."""
    return ["--cd", folder] if folder else []


MAIN = Pipeline("", Params, lambda file: load.load(file))
CLASSIFIER = Pipeline("classify", ClassifierParams, lambda file: classifier_config.load_classifier(file))
PIPELINES = (MAIN, CLASSIFIER)
