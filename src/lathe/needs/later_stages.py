"""What later stages need besides the trained model: files, programs, packages, keys, and types that fit the base.

It is looked at when the training starts and by `lathe doctor`: what is missing would else be said after the hours of
training. What only warns or refuses can change no output, so that DVC need not know of it.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.artifacts import list_artifacts
from lathe.config.engines import SERVER, VLLM, choose_engine
from lathe.config.export_params import FormatExport
from lathe.config.params import BertScore, Judge, Params, Quantize

# Of the extra `judge`, in pyproject.toml.
CLIENT_PACKAGES = ("httpx2", "tenacity")
# A server that is there answers at once; one of the merged model cannot be there before the training.
SECONDS_TO_ANSWER = 3.0


def check_later_stages(params: Params, base: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what a later stage may fail of; raises InputError for what it would fail of.

    `base` is the folder of the base model; what depends on it is looked at if it is there.
    """
    for check in list_checks(params, base, environment):
        yield from check()


def list_checks(params: Params, base: Path, environment: Mapping[str, str]) -> list[Callable[[], Iterator[str]]]:
    """Return the checks one by one: `lathe doctor` goes on after one that refuses."""
    return [
        lambda: _check_texts(params),
        lambda: _check_judge(params.judge, [*params.quantize.types, *params.export.formats], environment),
        lambda: _check_engine(params, environment),
        lambda: _check_program(params.quantize),
        lambda: _check_types(params.quantize, base),
        lambda: _check_range(params, base),
        lambda: _check_encoder(params),
        lambda: _check_export(params.export, base),
    ]


def _check_texts(params: Params) -> Iterator[str]:
    """Read the texts that stages depend on; DVC asks for the rubric whether there is a judge or not."""
    from lathe.evaluation.judge.judged_rows import read_rubric
    from lathe.inference.general_text import read_paragraphs

    read_paragraphs(paths.ROOT / params.evaluate.general_text)
    read_rubric(paths.ROOT / params.judge.rubric)
    yield from ()


def _check_judge(judge: Judge, types: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    if not judge.enabled:
        return
    from lathe.evaluation.judge import api_keys
    from lathe.evaluation.judge.judged_pairs import find_other_revision
    from lathe.evaluation.judge.providers.provider import require_judge_file

    if judge.mode == "pairwise":
        find_other_revision(list_artifacts(types), judge.against)  # raises if there is none
    if judge.provider == "gguf":
        require_judge_file(judge, paths.ROOT)
        return
    _require_client("judge.enabled is true", "set judge.enabled to false")
    from lathe.evaluation.judge.certificates import load_certificates

    load_certificates(paths.ROOT / judge.ca_bundle if judge.ca_bundle else None)
    try:
        api_keys.read_key(judge.provider, judge.base_url, environment)
    except InputError as error:
        if error.code != "missing-key":
            raise
        yield f"{error}; judge will fail after the training"


def _require_client(reason: str, otherwise: str) -> None:
    if missing := [name for name in CLIENT_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"{reason}, and the package {missing[0]} is not installed; `make setup EXTRAS=judge`, or {otherwise}",
            code="missing-extra",
        )


def _check_engine(params: Params, environment: Mapping[str, str]) -> Iterator[str]:
    """Ask the servers that answer for a list of their models, or look for vLLM."""
    settings, artifacts = params.generate, list_artifacts(params.quantize.types)
    chosen = {choose_engine(settings, artifact) for artifact in artifacts}
    if VLLM in chosen:
        from lathe.inference.vllm_answers import find_python, read_version

        read_version(find_python(settings))
    if SERVER not in chosen:
        return
    _require_client("generate.engine is server", "set generate.engine to llama.cpp")
    from lathe.inference.server_answers import ServerEngine

    hurried = settings.model_copy(update={"max_retries": 0, "timeout_seconds": SECONDS_TO_ANSWER})
    for served in settings.servers:
        try:
            ServerEngine(served, hurried, environment)
        except InputError as error:
            if error.code == "invalid-key":
                raise
            yield f"{error}; generate will fail after the training, unless that has changed by then"


def _check_program(quantize: Quantize) -> Iterator[str]:
    if quantize.binary is not None:
        file = paths.ROOT / quantize.binary
        if not file.is_file() or not os.access(file, os.X_OK):
            known = shutil.which("llama-quantize")
            raise InputError(
                f"quantize.binary is {quantize.binary}: no program is there; name llama.cpp's llama-quantize"
                f"{f', such as {known}' if known else ''}, or null for the library of `make setup`",
                code="missing-program",
            )
    yield from ()


def _check_types(quantize: Quantize, base: Path) -> Iterator[str]:
    """Hold the types of single tensors against the base's tensors."""
    chosen = (quantize.output_tensor_type, quantize.token_embedding_type, quantize.tensor_types)
    if not any(chosen) or not (base / "config.json").is_file():
        return
    from lathe.gguf.base_tensors import check_tensor_types

    check_tensor_types(
        base,
        output_tensor_type=quantize.output_tensor_type,
        token_embedding_type=quantize.token_embedding_type,
        tensor_types=quantize.tensor_types or [],
    )
    yield from ()


def _check_range(params: Params, base: Path) -> Iterator[str]:
    """Look for weights of the base that the merged model's type would not hold."""
    if params.merge.dtype != "float16" or not (base / "config.json").is_file():
        return
    from lathe.models.weight_range import find_beyond_f16

    if beyond := find_beyond_f16(base):
        name, largest = beyond
        raise InputError(
            f"merge.dtype is float16, and the base's {name} holds {largest:g}, more than it can; set merge.dtype to "
            "auto or bfloat16",
            code="weights-beyond-f16",
        )
    yield from ()


def _check_encoder(params: Params) -> Iterator[str]:
    """Open BERTScore's encoder, which `fetch_encoder` brings before the training."""
    if "bert_score" not in params.evaluate.metrics or not (paths.MODEL_ENCODER / "config.json").is_file():
        return
    from lathe.evaluation.bert_score import Encoder, read_baseline

    settings: BertScore = params.bert_score
    encoder = Encoder(paths.MODEL_ENCODER, num_layers=settings.num_layers, max_length=settings.max_length)
    encoder.load_tokenizer()
    if settings.baseline not in (None, "shuffled"):
        read_baseline(paths.ROOT / settings.baseline, encoder.num_layers)
    yield from ()


def _check_export(settings: FormatExport, base: Path) -> Iterator[str]:
    """Look for the packages that formats are made with, and for the base among the models that they export."""
    from lathe.export.environments import check_architecture, find_python, read_versions

    for name in settings.formats:
        read_versions(name, find_python(name, settings))
        if (base / "config.json").is_file():
            check_architecture(name, base)
    yield from ()
