"""Configuration of the classifier: `classify/params.yaml` and the presets that it selects, loaded and validated."""

from pathlib import Path
from typing import cast

from lathe.common import paths
from lathe.common.dotted_keys import get_value
from lathe.config.base import Section
from lathe.config.classifier_params import ClassifierParams
from lathe.config.load import check_preset, refuse_problems, validate_tree
from lathe.config.presets import ModelPreset, Presets, SingleDataset
from lathe.config.yaml_files import read_yaml


class ClassifierConfig(Section):
    """The configuration of a run: the parameters and the presets that they select."""

    params: ClassifierParams
    model: ModelPreset
    dataset: SingleDataset


def load_classifier(
    params_file: Path = paths.CLASSIFIER_PARAMS, presets_file: Path = paths.PRESETS
) -> ClassifierConfig:
    """Read and validate both files.

    Raises InputError with one line per problem, all problems of both files at once.
    """
    tree, presets_tree = read_yaml(params_file), read_yaml(presets_file)
    shown = f"{params_file.parent.name}/{params_file.name}"
    problems = validate_tree(ClassifierParams, tree, shown) + validate_tree(Presets, presets_tree, presets_file.name)
    for key, table in (("model.backbone", "models"), ("dataset", "datasets")):
        problems += check_preset(tree, presets_tree, key, table, shown, presets_file.name)
    name = get_value(tree, "dataset")
    if isinstance(name, str) and get_value(presets_tree, f"datasets.{name}.source") == "mixture":
        line = f"{shown}: dataset is {name!r}, a mixture; must be one dataset; name one of its parts as a preset"
        problems.append(("mixture", line))
    refuse_problems(problems)
    params, presets = ClassifierParams.model_validate(tree), Presets.model_validate(presets_tree)
    return ClassifierConfig(
        params=params,
        model=presets.models[params.model.backbone],
        dataset=cast(SingleDataset, presets.datasets[params.dataset]),
    )
