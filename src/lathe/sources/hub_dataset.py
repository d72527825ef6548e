"""Dataset repositories of the Hub: which files are which split, linked or converted for `preprocess`."""

import json
import logging
import math
import re
import shutil
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets.exceptions import DatasetsError

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.scratch import temporary_folder
from lathe.common.text import did_you_mean, summarize_error
from lathe.data.part_of_file import count_rows
from lathe.data.split_files import get_suffix
from lathe.sources.hub import Repository
from lathe.sources.hub_answers import UNREADABLE

logger = logging.getLogger(__name__)

# Files that declare the configurations and splits of a repository.
CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
CONVERTED = re.compile(r"([^/]+)/([^/]+)/\d{4}\.parquet")  # configuration and split in `refs/convert/parquet`
ARCHIVES = (".zip", ".tar")  # their content is unknown until they are opened

# Builders of the `datasets` library whose rows are texts and numbers, each with the file type that `preprocess` reads
# itself. (A .json on the Hub may be one array or one object per line: the library distinguishes them.)
READ_UNCHANGED = {"parquet": ".parquet", "json": ".jsonl", "csv": ".csv", "arrow": ".arrow"}


class Layout:
    """The splits of one configuration of a dataset repository.

    The `datasets` library itself finds them, in a folder of empty files with the repository's names: its rules for file
    names and the declarations of the README apply before any row is downloaded. Code of the repository is never run.
    """

    def __init__(self, repository: Repository, config: str | None) -> None:
        """Find the splits.

        Raises InputError if `config` is unknown, if it is None and there are several, and if no file has rows.
        """
        _silence_libraries()
        self.repository = repository
        script = f"{repository.name.split('/')[-1]}.py"
        if script in repository.paths:
            logger.warning("%s: its %s is not run; its data files are read as they are", repository.name, script)
        with temporary_folder(paths.SCRATCH, "hub") as folder:
            self.builder = self._load_builder(folder, config)
            found = self.builder.config.data_files.items()
            self.splits = {
                str(split): [str(Path(file).relative_to(folder)) for file in files] for split, files in found
            }

    def place(self, split: str, wanted: str, folder: Path, rows: int | None = None) -> None:
        """Put the repository's split `wanted` into `folder`, named as `split`.

        Where it is in many files, and only so many `rows` are to be read, no more files are downloaded than hold them.
        Its files are linked. A slice, or a format that `preprocess` does not read, is converted to one Parquet file:
        the same bytes for the same rows. Raises InputError if there is no such split, or if it cannot be read.
        """
        name, bracket, _ = wanted.partition("[")
        if name not in self.splits:
            raise InputError(
                f"presets.yaml: {split}_split is {wanted!r}, but {self.repository.name} has no split {name!r}; "
                f"{did_you_mean(name, list(self.splits))}",
                code="no-such-split",
            )
        files = self._download(self.splits[name], None if bracket else rows)
        suffix = READ_UNCHANGED[self._kind]
        if bracket or self._options or not suffix or any(Path(path).suffix != suffix for path in files):
            self._convert(split, wanted, list(files.values()), folder)
            return
        for number, file in enumerate(files.values()):
            shard = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
            paths.link(file, folder / f"{split}{shard}{suffix}")

    def _download(self, names: list[str], rows: int | None) -> dict[str, Path]:
        """Return files of a split by name: all, or some from evenly over the list that hold so many rows."""
        if rows is None or len(names) == 1:
            return self.repository.files(names)
        found = self.repository.files(names[:1])
        while (count := sum(map(_count_rows, found.values()))) < rows and len(found) < len(names):
            wanted = min(len(names), max(len(found) + 1, math.ceil(rows * len(found) / max(count, 1))))
            more = {names[len(names) * number // wanted] for number in range(wanted)} - found.keys()
            rest = [name for name in names if name not in found]
            found |= self.repository.files([name for name in names if name in more] or rest[:1])
        if len(found) < len(names):
            logger.info(
                "%s: %d of %d files hold enough rows for the limit", self.repository.name, len(found), len(names)
            )
        return {name: found[name] for name in names if name in found}

    def _load_builder(self, folder: Path, config: str | None) -> datasets.DatasetBuilder:
        name = self.repository.name
        for path in self.repository.paths:
            if not path.endswith(ARCHIVES):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).touch()
        for path, file in self.repository.files(path for path in CARDS if path in self.repository.paths).items():
            shutil.copyfile(file, folder / path)
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(_build_conversion_card(self.repository.paths))
        try:
            configs = [str(one) for one in datasets.get_dataset_config_names(str(folder))]
            chosen = config or datasets.get_dataset_default_config_name(str(folder))
            if chosen is None:
                raise InputError(
                    f"presets.yaml: {name} has several configurations; choose one with `config:`: {', '.join(configs)}",
                    code="several-configurations",
                )
            if chosen not in configs:
                raise InputError(
                    f"presets.yaml: config is {chosen!r}, which {name} has not; {did_you_mean(chosen, configs)}",
                    code="no-such-configuration",
                )
            builder = datasets.load_dataset_builder(str(folder), name=chosen, cache_dir=str(folder / ".cache"))
        except (DatasetsError, OSError, yaml.YAMLError, *UNREADABLE) as error:
            problem = summarize_error(error).replace(str(folder), name)
            raise InputError(
                f"{name}: holds no data files that can be read ({problem}); try the hub's own conversion, `revision: "
                "refs/convert/parquet`, or put files of yours under data/local",
                code="no-data-files",
            ) from None
        kind = builder.__module__.rpartition(".")[2]
        if kind not in READ_UNCHANGED:
            raise InputError(
                f"{name}: its files are for the builder {kind!r}, not rows of text; expected one of "
                f"{', '.join(READ_UNCHANGED)}",
                code="not-text",
            )
        return builder

    @property
    def _kind(self) -> str:
        return str(self.builder.__module__.rpartition(".")[2])

    @property
    def _options(self) -> dict[str, Any]:
        """Options of the README for reading the files, such as `sep: ";"`."""
        config = self.builder.config
        default, common = type(config)(), {field.name for field in fields(datasets.BuilderConfig)}
        values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in common}
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    def _convert(self, split: str, wanted: str, files: list[Path], folder: Path) -> None:
        # The builder's class was made for the folder of empty files; its base class reads any files.
        reader = type(self.builder).__bases__[0]
        name = wanted.partition("[")[0]
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            try:
                builder = reader(cache_dir=cache, data_files={name: [str(file) for file in files]}, **self._options)
                builder.download_and_prepare()
                rows = builder.as_dataset(split=wanted)
                if not len(rows):
                    raise ValueError("it has no rows")
                rows.to_parquet(folder / f"{split}.parquet")
            except (DatasetsError, ValueError) as error:
                problem = summarize_error(error.__cause__ or error)
                raise InputError(
                    f"presets.yaml: {split}_split is {wanted!r}, but {self.repository.name} cannot give it: {problem}",
                    code="unreadable-split",
                ) from None


def _count_rows(file: Path) -> int:
    """Return the rows of a file; 0 if that cannot be told."""
    return count_rows(file) if get_suffix(file) else 0


def _build_conversion_card(files: list[str]) -> str:
    """Return a README that declares what the Hub's own conversion expresses by folders; else an empty one."""
    configs: dict[str, dict[str, list[str]]] = {}
    for match in filter(None, map(CONVERTED.fullmatch, files)):
        configs.setdefault(match[1], {}).setdefault(match[2], []).append(match[0])
    declared = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in configs.items()
    ]
    return f"---\n{json.dumps({'configs': declared})}\n---\n" if declared else ""


def _silence_libraries() -> None:
    """Turn off bars in logs, and messages of the libraries about empty files; their errors become InputError."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
