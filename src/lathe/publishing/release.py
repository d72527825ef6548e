"""Release: the files of a repository for the Hub, laid out in a folder under names that programs find them by.

Ollama (`ollama run hf.co/OWNER/NAME:TYPE`), LM Studio and llama.cpp (`-hf OWNER/NAME:TYPE`) go by the quantization type
at the end of a GGUF's name. Ollama also reads the files `template`, `system` and `params` at the top.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.json_files import read_json
from lathe.common.metric_files import unwrap_list
from lathe.common.text import did_you_mean
from lathe.config.artifacts import get_file_name
from lathe.config.export_params import FORMATS
from lathe.config.params import Params
from lathe.evaluation.best_artifact import choose_best_artifact
from lathe.export.convert import LINEAGE_FILE
from lathe.gguf.description import describe_gguf
from lathe.provenance.lineage import hash_path
from lathe.provenance.signed_statement import STATEMENT_FILE, make_statement, sign_statement
from lathe.publishing.format_card import TOP
from lathe.publishing.hub_card import render_hub_card
from lathe.publishing.licences import SourceLicence, find_licences

ADAPTER, ADAPTER_GGUF, MERGED = "adapter", "adapter-gguf", "merged"
README = "README.md"


@dataclass(frozen=True)
class Release:
    """A repository laid out in `folder`: its files in the repository with their sizes in bytes, and what to know."""

    repository: str
    folder: Path
    files: Mapping[str, int]
    licences: Sequence[SourceLicence]
    gates_passed: bool
    key: Path | None


def prepare_release(repository: str, wanted: Sequence[str], params: Params, *, key: Path | None) -> Release:
    """Lay out what is to be published below .scratch/publish; large files are links to those of the pipeline.

    `wanted` are types of quantize.types, `merged`, `adapter`, `adapter-gguf` and formats of export.formats; none: all
    types, and the adapter if there is one. A format alone is at the top of the repository, where its runtime looks for
    it; beside other files, it is in a folder of its name.

    With `key` a signed statement on all files is among them. Raises InputError for a name that is none,
    and for a file that is not there, or differs from dvc.lock.
    """
    check_name(repository)
    chosen = _choose_files(wanted, params)
    _check_against_lock(chosen)
    stem = re.sub(r"[-_.]gguf$", "", repository.split("/")[1], flags=re.IGNORECASE)
    types = [name for name in chosen if name not in (ADAPTER, ADAPTER_GGUF, *FORMATS)]
    names = {name: f"{stem}-{'F16' if name == MERGED else name}.gguf" for name in types}
    names |= {name: TOP if len(chosen) == 1 else f"{name}/" for name in chosen if name in FORMATS}
    lineage = _read_lineage(chosen)
    model, dataset = (read_json(paths.METRICS / f"fetch/{item}.json")["origin"][0] for item in ("model", "dataset"))
    base_licence = _read_base_licence()
    licences = find_licences(model, dataset, base_licence)
    target = paths.SCRATCH / "publish" / repository.replace("/", "--")
    target.parent.mkdir(parents=True, exist_ok=True)
    with paths.replace_folder(target) as folder:
        for name, file in chosen.items():
            _add_files(folder, name, file, names, model)
        (folder / README).write_text(
            render_hub_card(repository, names, params, lineage=lineage, licence=base_licence, licences=licences,
                            has_adapter=ADAPTER in chosen, signed=key is not None),
            encoding="utf-8",
        )  # fmt: skip
        if types:
            _write_ollama_files(folder, chosen[types[0]], names, params, types)
        if key:
            (folder / STATEMENT_FILE).write_text(sign_statement(make_statement(folder, lineage), key), encoding="utf-8")
    files = {str(file.relative_to(target)): file.stat().st_size for file in sorted(target.rglob("*")) if file.is_file()}
    gates = unwrap_list(read_json(paths.METRICS / "evaluate/gates.json"))
    return Release(repository, target, files, licences, bool(gates["passed"]), key)


def check_name(repository: str) -> None:
    """Raise InputError unless a name is OWNER/NAME as the Hub takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository}: {str(error).splitlines()[0]}", code="invalid-name") from None
    if "/" not in repository:
        raise InputError(f"{repository}: has no owner; name the repository as OWNER/NAME", code="invalid-name")


def _choose_files(wanted: Sequence[str], params: Params) -> dict[str, Path]:
    known = {name: paths.GGUF / get_file_name(name) for name in [*params.quantize.types, MERGED]}
    if params.training.tuning == "lora":
        known |= {ADAPTER: paths.MODEL_ADAPTER, ADAPTER_GGUF: paths.GGUF / "adapter/adapter-f16.gguf"}
    known |= {name: paths.MODELS_EXPORTED / name for name in params.export.formats}
    default = [*params.quantize.types, *([ADAPTER] if ADAPTER in known else [])]
    for name in wanted:
        if name not in known:
            raise InputError(f"--files {name}: {did_you_mean(name, list(known))}", code="no-such-artifact")
    chosen = {name: known[name] for name in dict.fromkeys(wanted or default)}
    for name, file in chosen.items():
        if not file.exists():
            shown = file.relative_to(paths.ROOT)
            raise InputError(
                f"{shown}: is not there; `make repro` or `dvc pull {shlex.quote(str(shown))}` brings {name}",
                code="missing-file",
            )
    return chosen


def _check_against_lock(chosen: Mapping[str, Path]) -> None:
    """Refuse files that are not those of the measured run: their card would be another model's."""
    from lathe.common.dvc_api import open_repository
    from lathe.provenance.dvc_lock import read_current_stages

    with open_repository(paths.ROOT) as repo:
        outs = {
            out["path"]: out["md5"] for stage in read_current_stages(repo).values() for out in stage.get("outs", [])
        }
    for name, file in chosen.items():
        path = file.relative_to(paths.ROOT).as_posix()
        tracked = path if path in outs else str(Path(path).parent)  # the adapter's GGUF is in a folder of its own
        if outs.get(tracked) != hash_path(paths.ROOT / tracked):
            raise InputError(
                f"{path}: differs from dvc.lock, which the scores of {name} belong to; `lathe verify` says how, and "
                "`make repro` makes both anew",
                code="differs-from-lock",
            )


def _read_lineage(chosen: Mapping[str, Path]) -> dict[str, str]:
    """Return the `lathe.*` keys of the first GGUF or format among the files, or of the adapter's GGUF."""
    candidates = [file for name, file in chosen.items() if name != ADAPTER]
    file = candidates[0] if candidates else paths.GGUF / "adapter/adapter-f16.gguf"
    if not file.exists():
        return {}
    metadata = read_json(file / LINEAGE_FILE) if file.is_dir() else describe_gguf(file)["metadata"]
    return {key.removeprefix("lathe."): str(text) for key, text in metadata.items() if key.startswith("lathe.")}


def _read_base_licence() -> dict[str, str]:
    from lathe.reports.model_card import read_license

    if not paths.MODEL_BASE.is_dir():
        raise InputError(
            "models/base: is not there, whose licence is carried along; `dvc pull models/base` brings it",
            code="missing-file",
        )
    return read_license(paths.MODEL_BASE)


def _add_files(folder: Path, name: str, file: Path, names: Mapping[str, str], model: Mapping[str, Any]) -> None:
    if name == ADAPTER_GGUF:
        (folder / ADAPTER).mkdir(exist_ok=True)
        _link(file, folder / ADAPTER / file.name)
        return
    if name in FORMATS:
        for part in (path for path in sorted(file.rglob("*")) if path.is_file()):
            target = folder / names[name] / part.relative_to(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(part, target)
        return
    if name != ADAPTER:
        _link(file, folder / names[name])
        return
    (folder / ADAPTER).mkdir(exist_ok=True)
    for part in sorted(file.iterdir()):
        if part.name == "adapter_config.json":
            config = read_json(part)
            # The path in this repository, which nobody else has.
            config |= {"base_model_name_or_path": model.get("id") or model["name"], "revision": model.get("commit")}
            (folder / ADAPTER / part.name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        elif part.is_file() and part.name != README:
            _link(part, folder / ADAPTER / part.name)


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the file system has no links between the two folders."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _write_ollama_files(
    folder: Path, gguf: Path, names: Mapping[str, str], params: Params, types: Sequence[str]
) -> None:
    """Write the Modelfile for the best of the files, and for Ollama on the Hub `template`, `system` and `params`."""
    from lathe.gguf.llama_model import LlamaModel
    from lathe.reports.modelfile import build_modelfile, find_stop_tokens, translate_template

    validation = unwrap_list(read_json(paths.METRICS / "evaluate/validation.json"))
    best = choose_best_artifact(validation, types, params.evaluate.primary_metric)
    n_ctx = read_json(paths.METRICS / "generate/merged.json")["sizes"][0]["n_ctx"]
    with LlamaModel(gguf, vocab_only=True) as model:
        template = model.chat_template
        (folder / "Modelfile").write_text(build_modelfile(names[best], template, n_ctx=n_ctx), encoding="utf-8")
        translated = translate_template(template)
        stops = find_stop_tokens(template)
    options = {"num_ctx": n_ctx, "repeat_penalty": 1, "stop": stops, "temperature": 0}
    (folder / "params").write_text(json.dumps(options, ensure_ascii=False) + "\n", encoding="utf-8")
    if translated:
        (folder / "template").write_text(translated.text, encoding="utf-8")
        if translated.system:
            (folder / "system").write_text(translated.system, encoding="utf-8")
