"""Sources of base models, datasets and encoders: built in, local files, the Hugging Face Hub, Python packages."""

import hashlib
import logging
import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git_lfs import refuse_pointer
from lathe.common.scratch import temporary_folder
from lathe.config.adapter_base import holds_adapter_alone, is_repository, read_base_name
from lathe.config.presets import (
    GGUF_SUFFIX,
    BuiltinDataset,
    BuiltinModel,
    ChangeableModel,
    DatasetPreset,
    EncoderPreset,
    HubDataset,
    HubEncoder,
    HubModel,
    LocalDataset,
    LocalEncoder,
    LocalModel,
    MixtureDataset,
    ModelPreset,
    PackageEncoder,
    PackageModel,
)
from lathe.data.misnamed_files import refuse_misnamed
from lathe.data.part_of_file import count_rows_to_read
from lathe.data.split_files import require_data_files
from lathe.models import model_folder
from lathe.models.templates.install_template import install_template
from lathe.sources.model_files import (
    check_text_file,
    choose_weight_files,
    describe_lost_base,
    fetch_hub_adapter,
    fetch_hub_file,
    fetch_hub_files,
    select_files,
)
from lathe.sources.single_template import leave_single_template

if TYPE_CHECKING:
    from lathe.sources.hub import Repository

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE_BYTES = 5_000_000_000  # of a base with its adapter

# What is known of a source besides its files: for the Hub the repository, the wanted revision, and its commit; for a
# package its name and version; for a GGUF file what `gguf_model.write_model` returns.
Origin = dict[str, Any]


def fetch_model(preset: ModelPreset, folder: Path, *, seed: int) -> Origin:
    """Fill the empty `folder` with a Hugging Face model: config, safetensors, tokenizer, chat template.

    A GGUF file is dequantized. Raises InputError if a local file or folder is missing, outside of models/local, or no
    such model, if the Hub cannot or will not give it, if the package is not installed in this version, and if the
    preset's template does not fit it.
    """
    origin: Origin = {}
    match preset:
        case BuiltinModel():
            from lathe.sources.builtin import tiny_model

            tiny_model.build(folder, seed)
        case ChangeableModel(adapter=str(adapter)):
            found = _find_local(adapter, paths.MODELS_LOCAL)
            origin = _merge_adapter(preset, found, adapter, folder)
            origin["adapter"] = adapter
        case LocalModel() | PackageModel() | HubModel():
            origin = _place_base(preset, folder)
    if isinstance(preset, ChangeableModel) and preset.template:
        install_template(preset.template, folder)
    return origin


def fetch_encoder(preset: EncoderPreset, folder: Path) -> Origin:
    """Fill the empty `folder` with an encoder: config, safetensors, tokenizer.

    Raises InputError if there is none, if it is incomplete or pickled, if the Hub cannot or will not give it, and if
    the package is not installed in this version.
    """
    match preset:
        case LocalEncoder() | PackageEncoder():
            source, shown, origin = _find_on_this_machine(preset)
            _link_files(_select_files(source, shown), folder)
            return origin
        case HubEncoder():
            from lathe.sources.hub import Repository

            repository = Repository("model", preset.id, preset.revision)
            _link_files(fetch_hub_files(repository), folder)
            return {"id": preset.id, "revision": preset.revision, "commit": repository.commit}


def fetch_dataset(preset: DatasetPreset, folder: Path, *, seed: int) -> Origin:
    """Fill the empty `folder` with the dataset's files, unchanged; those of a folder `train/` are named `train-*`.

    Each dataset of a mixture gets a folder of its name. Files of the Hub are named for the splits they are used as; a
    slice of a split, or a format that `preprocess` does not read, becomes Parquet. Raises InputError if a local path is
    missing, outside of data/local, or without a data file, and if the Hub cannot or will not give it.
    """
    match preset:
        case MixtureDataset():
            return {
                "datasets": [_fetch_part(name, part, folder / name, seed) for name, part in preset.datasets.items()]
            }
        case BuiltinDataset():
            from lathe.common.jsonl import write_jsonl
            from lathe.sources.builtin import household_commands

            if preset.content == "paragraphs":
                shutil.copyfile(Path(household_commands.__file__).with_name("paragraphs.txt"), folder / "train.txt")
                return {}

            for split, rows in household_commands.make_rows(seed, errors=preset.errors).items():
                write_jsonl(rows, folder / f"{split}.jsonl")
        case LocalDataset():
            source = _find_local(preset.path, paths.DATA_LOCAL)
            for name, file in require_data_files(source, preset.path).items():
                shown = f"{preset.path}: {name}" if source.is_dir() else preset.path
                refuse_pointer(file, shown)
                refuse_misnamed(file, shown)
                # Copied, not linked: DVC makes a stage's outputs read-only, and these are the user's own files.
                shutil.copyfile(file, folder / name)
        case HubDataset():
            from lathe.sources.hub import Repository
            from lathe.sources.hub_dataset import Layout

            repository = Repository("dataset", preset.id, preset.revision)
            layout = Layout(repository, preset.config)
            named = {
                "train": preset.train_split,
                "validation": preset.validation_split,
                "test": preset.test_split,
            }
            present = {split: wanted for split, wanted in named.items() if wanted}
            for split, wanted in present.items():
                layout.place(split, wanted, folder, count_rows_to_read(preset.limits, split, present))
            return {"id": preset.id, "revision": preset.revision, "commit": repository.commit}
    return {}


def _fetch_part(name: str, preset: DatasetPreset, folder: Path, seed: int) -> Origin:
    """Fetch a dataset of a mixture into a folder of its own; return its origin, with a digest of its files."""
    folder.mkdir()
    origin = fetch_dataset(preset, folder, seed=seed)
    return {"name": name, "source": preset.source, **origin, "sha256": _hash_files(folder)}


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        with file.open("rb") as source:
            digest.update(f"{file.name}\0{hashlib.file_digest(source, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _place_base(preset: LocalModel | PackageModel | HubModel, folder: Path) -> Origin:
    """Fill the empty `folder` with the model of a preset, without its adapter and template; return its origin."""
    if not isinstance(preset, HubModel):
        source, shown, origin = _find_on_this_machine(preset)
        _place_model(source, shown, folder, origin)
        return origin
    from lathe.sources.hub import Repository

    repository = Repository("model", preset.id, preset.revision)
    origin = {"id": preset.id, "revision": preset.revision, "commit": repository.commit}
    if preset.file:
        _place_model(fetch_hub_file(repository, preset.file), preset.file, folder, origin)
    elif holds_adapter_alone(repository.paths):
        return _place_hub_adapter(repository, folder, origin)
    else:
        _link_files(fetch_hub_files(repository), folder)
        leave_single_template(folder, preset.id)
    return origin


def _place_hub_adapter(repository: "Repository", folder: Path, origin: Origin) -> Origin:
    """Fill the empty `folder` with the adapter of a repository and the base that it names, as one model."""
    found = fetch_hub_adapter(repository)
    named, revision = read_base_name(found)
    if not is_repository(named):
        raise InputError(describe_lost_base(repository.name, named), code="adapter-as-base")
    base = HubModel(source="hub", id=named, revision=revision, file=None, template=None, adapter=None)
    of_base = _merge_adapter(base, found, repository.name, folder)
    return {**origin, "base": of_base["id"], "base_revision": of_base["revision"], "base_commit": of_base["commit"]}


def _place_model(source: Path, shown: str, folder: Path, origin: Origin) -> None:
    """Fill the empty `folder` from a model folder or a GGUF file; add to `origin` what is known of such a file."""
    if source.is_dir():
        _link_files(_select_files(source, shown), folder)
        leave_single_template(folder, shown)
        return
    if source.suffix != GGUF_SUFFIX:
        raise InputError(
            f"{shown}: is a file; give a GGUF file, or the folder that holds config.json and the safetensors",
            code="not-a-folder",
        )
    refuse_pointer(source, shown)
    from lathe.sources import gguf_model

    origin |= gguf_model.write_model(source, folder)


def _merge_adapter(preset: LocalModel | PackageModel | HubModel, adapter: Path, shown: str, folder: Path) -> Origin:
    """Fill the empty `folder` with a model and an adapter of it, called `shown`, as one model, to go on from there."""
    from lathe.models.merge.merge import merge

    of = preset.id if isinstance(preset, HubModel) else preset.path
    with temporary_folder(folder.parent, "base") as base:
        try:
            origin = _place_base(preset, base)
            report = merge(
                base, adapter, folder, dtype="auto", max_shard_size_bytes=MAX_SHARD_SIZE_BYTES, may_change_nothing=True
            )
        except InputError as error:
            text = str(error).replace(str(base), of).replace(str(adapter), shown)
            text = text.removeprefix(f"{shown}: ").removeprefix(f"{of}: ")
            raise InputError(f"{shown}, an adapter of {of}: {text}", code=error.code) from None
    leave_single_template(folder, shown)
    if not report.tensors_changed:
        logger.warning("%s, an adapter of %s: all its deltas are zero; the base is taken as it is", shown, of)
    return origin


def _find_on_this_machine(
    preset: LocalModel | LocalEncoder | PackageModel | PackageEncoder,
) -> tuple[Path, str, Origin]:
    """Return the file or folder of a model, its name for messages, and what is known of its source."""
    if isinstance(preset, LocalModel | LocalEncoder):
        return _find_local(preset.path, paths.MODELS_LOCAL), preset.path, {}
    from lathe.sources import python_package

    source = python_package.find_files(preset.package, preset.version, preset.path)
    return source, f"{preset.package}: {preset.path}", {"package": preset.package, "version": preset.version}


def _find_local(path: str, home: Path) -> Path:
    source = Path(os.path.normpath(paths.ROOT / path))
    if home not in source.parents:
        raise InputError(
            f"presets.yaml: path {path!r} is not under {home.relative_to(paths.ROOT)}/, which is what DVC watches; "
            "put or link the files there",
            code="outside-local",
        )
    for part in (source, *source.parents[: len(source.relative_to(home).parts) - 1]):
        if part.is_symlink() and part.is_dir():
            shown = part.relative_to(paths.ROOT)
            quoted = shlex.quote(str(shown))
            raise InputError(
                f"{shown}: is a link to a folder, behind which DVC sees no change; link the files in it: "
                f"`rm {quoted} && cp -rs {shlex.quote(str(part.resolve()))} {quoted}`",
                code="linked-folder",
            )
    if not source.exists():
        raise InputError(
            f"{path}: no such file or folder; put it there and run `dvc add {shlex.quote(path)}`", code="no-such-file"
        )
    return source


def _select_files(source: Path, shown: str) -> dict[str, Path]:
    """Return the files to take of a model folder, by name. Raises InputError if it is no complete model."""
    if not source.is_dir():
        raise InputError(
            f"{shown}: is a file; give the folder that holds config.json and the safetensors", code="not-a-folder"
        )
    for file in sorted(source.iterdir()):
        if file.is_symlink() and not file.exists():
            raise InputError(
                f"{shown}/{file.name}: is a link to {file.readlink()}, where nothing is; put the file there, or remove "
                "the link",
                code="broken-link",
            )
    names = [file.name for file in source.iterdir() if file.is_file()]
    if holds_adapter_alone(names):
        raise InputError(describe_lost_base(shown, read_base_name(source)[0]), code="adapter-as-base")
    if "config.json" not in names and (inner := sorted(source.glob("*/config.json"))):
        name = inner[0].parent.name
        raise InputError(
            f"{shown}: holds no config.json; its folder {name} does: give {shown}/{name}", code="incomplete-model"
        )
    names = select_files(names, shown)
    names = choose_weight_files(names, source, shown)
    for name in names:
        refuse_pointer(source / name, f"{shown}/{name}")
        if name.endswith((".json", ".jinja")):
            check_text_file(source / name, f"{shown}/{name}")
    # The headers show what would fail an hour later, in `train`, `merge` or `evaluate`.
    model_folder.read_config(source)
    model_folder.open_model(source)
    return {name: source / name for name in names}


def _link_files(files: dict[str, Path], folder: Path) -> None:
    """Link the weights into a folder, copy the texts beside them."""
    for name, file in files.items():
        # DVC makes a stage's outputs read-only, and their hard links too: right for gigabytes of weights, wrong for
        # texts, which people edit and a preset's template changes.
        place = paths.link if name.endswith(".safetensors") else shutil.copyfile
        place(file, folder / name)
