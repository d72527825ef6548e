"""The command `lathe data`: what a dataset's files hold, before they are used."""

import json
import sys
import tempfile
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.load import load
from lathe.config.yaml_files import read_yaml


def check_data(source: Path, *, prompt: str | None, completion: str | None, as_json: bool) -> bool:
    """Print what preprocess would make of a dataset's file or folder; return whether it would drop no row.

    An entry of presets.yaml with this path says how to read it, unless columns are given. `source` may also be the name
    of an entry, a mixture too.
    """
    from lathe.config.presets import DatasetPreset, LocalDataset, Presets
    from lathe.data.check_file import check_datasets
    from lathe.data.check_text import format_check, make_preset
    from lathe.present_datasets import DatasetFiles, find_dataset_files, find_preset_of_path

    if bool(prompt) != bool(completion):
        missing = "--completion" if prompt else "--prompt"
        raise InputError(f"{missing}: is missing; name both columns, or neither", code="missing-option")
    params = load().params
    datasets = Presets.model_validate(read_yaml(paths.PRESETS)).datasets
    name, entry_of_path = ("", None) if prompt else find_preset_of_path(source.absolute(), datasets)
    preset: DatasetPreset | None = entry_of_path
    with tempfile.TemporaryDirectory() as folder:
        files: DatasetFiles | None
        if str(source) in datasets and not source.exists() and not prompt:
            name = str(source)
            preset = datasets[name]
            files = find_dataset_files(name, preset, Path(folder), seed=params.seed)
            if files is None:
                raise InputError(
                    f"{name}: has not been fetched from the Hub; select it (dataset: {name}) and run "
                    "`dvc repro fetch@dataset`",
                    code="not-fetched",
                )
        else:
            own = LocalDataset(source="local", path=str(source), prompt=prompt, completion=completion)
            files = {"": (source, entry_of_path or own)}
        try:
            found = check_datasets(files, seed=params.seed, settings=params.preprocess)
        except InputError as error:
            if error.code not in ("unknown-format", "ambiguous-format") or preset:
                raise
            raise InputError(f"{error}; here: --prompt COLUMN --completion COLUMN", code=error.code) from None
    entry = None if preset else make_preset(source, list(datasets), prompt=prompt, completion=completion)
    if as_json:
        used = {name: preset.model_dump(exclude_none=True)} if preset else entry
        sys.stdout.write(json.dumps({**found, "preset": used}, indent=2, ensure_ascii=False) + "\n")
    else:
        if name:
            sys.stdout.write(f"preset      {name}, of presets.yaml\n")
        sys.stdout.writelines(f"{line}\n" for line in format_check(found, source, entry))
    return not found["faults"] and not found["refusals"]
