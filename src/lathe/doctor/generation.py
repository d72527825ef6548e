"""Doctor's checks of the answers: whether they fit, where they are computed, and how long that takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.json_files import read_json, read_json_object
from lathe.common.metric_files import unwrap_list
from lathe.common.text import readable_seconds
from lathe.doctor.checks import Finding, Findings

if TYPE_CHECKING:
    from lathe.config.load import Config

LONG_SECONDS = 3600.0  # of answers, above which there is a warning


def check_held_out(config: "Config", root: Path) -> Findings:
    """Compare lengths and kind of the references with the parameters, if preprocess has run with this data and model.

    The report in Git is of the pipeline that was committed last.
    """
    from lathe.config.held_out_checks import find_misfits

    report, reason = _read_report(config, root)
    if report is None:
        yield Finding("held-out", "ok", reason)
        return
    misfits = list(find_misfits(report, config.params))
    for misfit in misfits:
        yield Finding("held-out", "fail" if misfit.code else "warning", misfit.text, misfit.remedy)
    if not misfits:
        yield Finding("held-out", "ok", "the references fit generate.max_new_tokens, generate.n_ctx and the score")


def check_answers(config: "Config", root: Path) -> Findings:
    """Say on what device llama.cpp answers, and how long the answers take at the speed that was measured last."""
    import torch

    from lathe.gguf.llama_library import load_library

    offloads = load_library().llama_supports_gpu_offload()
    if torch.cuda.is_available() and not offloads:
        text = "llama.cpp was built without CUDA: answers will be on the CPU, though torch sees a GPU"
        yield Finding("answers", "warning", text, "`make setup CUDA=1`")
    device = "the GPU" if offloads else "the CPU"
    settings = config.params.generate
    if settings.engine != "llama.cpp":
        text = f"generate.engine is {settings.engine}; llama.cpp scores the references, on {device}"
        yield Finding("answers", "ok", text)
        return
    report, reason = _read_report(config, root)
    if report is None:
        yield Finding("answers", "ok", f"on {device}; their number is not known: {reason}")
        return
    yield _estimate_answers(config, report, device, _read_speed(root))


def _estimate_answers(config: "Config", report: Mapping[str, Any], device: str, speed: float | None) -> Finding:
    from lathe.config.artifacts import list_artifacts
    from lathe.inference.generation_sizes import HELD_OUT, choose_sizes

    settings = config.params.generate
    kept = [split["kept"] for split in report["splits"] if split["split"] in HELD_OUT]
    rows = sum(count if settings.max_rows is None else min(count, settings.max_rows) for count in kept)
    files = len(list_artifacts(config.params.quantize.types))
    tokens = rows * files * choose_sizes(settings, report).max_new_tokens
    text = f"on {device}: {rows:,} rows by {files} files, at most {tokens:,} tokens"
    if speed is None:
        return Finding("answers", "ok", f"{text}; no speed has been measured here")
    text += f": {readable_seconds(tokens / speed)} at the {speed:,.0f} tokens/s of the last run"
    if tokens / speed > LONG_SECONDS:
        return Finding("answers", "warning", text, "lower generate.max_rows, or generate.max_new_tokens")
    return Finding("answers", "ok", text)


def _read_speed(root: Path) -> float | None:
    """Return the speed of the merged model in the last run, which metrics/timings has (tokens/s)."""
    file = root / "metrics/timings/generate.json"
    items = unwrap_list(read_json(file)).get("items", []) if file.is_file() else []
    speeds = [item["tokens_per_second"] for item in items if item["item"] == "merged" and "tokens_per_second" in item]
    return speeds[0] if speeds else None


def _read_report(config: "Config", root: Path) -> tuple[Any, str]:
    """Return the report of preprocess, or None and why there is none of this data and model."""
    params, report = config.params, root / "metrics/preprocess/report.json"
    if not (root / "data/processed").is_dir() or not report.is_file():
        return None, "lengths of the references are not known before preprocess has run"
    for kind, name in (("dataset", params.dataset), ("model", params.model)):
        file = root / f"metrics/fetch/{kind}.json"
        fetched = read_json_object(file)["origin"][0]["name"] if file.is_file() else name
        if fetched != name:
            return None, f"not checked: data/processed is of the {kind} {fetched}, not of {name}"
    return read_json_object(report), ""
