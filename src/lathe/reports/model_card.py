"""Model card: what the files are, how good they are, how to run them, where they come from.

It contains no date, no path of this machine and no secret, so that equal inputs give equal bytes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from lathe.common import paths
from lathe.common.json_files import read_json
from lathe.common.metric_files import unwrap_list
from lathe.common.text import summarize_error
from lathe.config.params import Params
from lathe.config.training_params import Lora

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

ScoresByArtifact = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CardFacts:
    """The JSON files of the stages; `lineage` are the `lathe.*` keys of the merged GGUF."""

    model: Mapping[str, Any]
    dataset: Mapping[str, Any]
    rows: Mapping[str, Any]
    validation: ScoresByArtifact
    test: ScoresByArtifact
    quantized: Mapping[str, Mapping[str, Any]]
    lineage: Mapping[str, str]
    license: Mapping[str, str]
    tasks: Mapping[str, ScoresByArtifact]  # of lm-evaluation-harness
    n_ctx: int  # context that the answers were measured in (tokens)


def read_card_facts(types: Sequence[str], *, lineage: Mapping[str, str], licence: Mapping[str, str]) -> CardFacts:
    """Return the facts of this run, from the metrics of its stages; `types` are those of files, and other formats."""
    return CardFacts(
        model=read_json(paths.METRICS / "fetch/model.json")["origin"][0],
        dataset=read_json(paths.METRICS / "fetch/dataset.json")["origin"][0],
        rows=read_json(paths.METRICS / "preprocess/report.json"),
        validation=unwrap_list(read_json(paths.METRICS / "evaluate/validation.json")),
        test=unwrap_list(read_json(paths.METRICS / "evaluate/test.json")),
        quantized={name: read_json(paths.METRICS / f"quantize/{name}.json") for name in types},
        lineage=lineage,
        license=licence,
        tasks=unwrap_list(read_json(paths.METRICS / "evaluate/benchmark.json")),
        n_ctx=read_json(paths.METRICS / "generate/merged.json")["sizes"][0]["n_ctx"],
    )


def render_model_card(facts: CardFacts, params: Params, best: str) -> str:
    """Return the card in Markdown, with the front matter of a Hugging Face model card; `best` is the file to run."""
    wanted = [*params.evaluate.metrics, "judge", "win_rate", "combined"]
    metrics = [name for name in wanted if any(scores.get(name) is not None for scores in facts.test.values())]
    splits = {split["split"]: split for split in facts.rows["splits"]}
    compared: dict[str, Any] = next(iter(facts.rows.get("token_ids", [])), {})
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, autoescape=False
    )
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=yaml.safe_dump(_build_front_matter(facts, params), sort_keys=False, allow_unicode=True),
        name=f"{facts.model['name']}-{facts.dataset['name']}",
        base=_describe_source(facts.model, facts.lineage["base.digest"]),
        dataset=_describe_source(facts.dataset, facts.lineage["dataset.digest"]),
        lineage=facts.lineage,
        license=facts.license,
        metrics=metrics,
        files=[_build_row(name, scores, metrics, facts.quantized) for name, scores in facts.test.items()],
        has_kl=any(scores.get("kl") is not None for scores in facts.test.values()),
        engines={name: scores["engine"] for name, scores in facts.test.items() if "engine" in scores},
        has_few_shot="base_few_shot" in facts.test,
        has_intervals=any(scores.get("intervals") for scores in facts.test.values()),
        rows={
            **{split: f"{splits[split]['kept']:,}" for split in splits},
            "scored": f"{min(splits['test']['kept'], params.generate.max_rows or splits['test']['kept']):,}",
            **{key: f"{facts.rows['rows'][key]:,}" for key in ("read", "dropped")},
        },
        best={
            "name": f"{best}.gguf",
            "score": _format_number(facts.validation[best][params.evaluate.primary_metric]),
        },
        tasks=[_build_task(name, scores, facts.quantized) for name, scores in facts.tasks.items()],
        primary_metric=params.evaluate.primary_metric,
        n_ctx=facts.n_ctx,
        training=_list_training_facts(params),
        supervised_tokens=f"{splits['train']['supervised_tokens']:,}",
        scripts=" and ".join(splits["train"]["scripts"]) or "no known",
        max_length=f"{params.training.max_length:,}",
        differing_samples=", ".join(compared.get("differing_samples", [])),
        rows_compared=f"{compared.get('rows_compared', 0):,}",
    )
    return text.rstrip("\n") + "\n"


def read_license(model: Path) -> dict[str, str]:
    """Return the licence keys in the front matter of a model's README; empty if there are none.

    A licence text without such a key is `other`, as the Hub calls it.
    """
    from huggingface_hub.repocard import metadata_load

    readme = model / "README.md"
    try:
        metadata = metadata_load(readme) if readme.exists() else None
        metadata = metadata if isinstance(metadata, dict) else None
    except Exception as error:  # a README from outside: whatever its text makes a YAML reader raise
        logger.warning("models/base/README.md: its front matter is no YAML object (%s)", summarize_error(error))
        metadata = None
    keys = ("license", "license_name", "license_link")
    license_keys = {key: str(metadata[key]) for key in keys if metadata and metadata.get(key)}
    if not license_keys and any(model.glob("LICENSE*")):
        return {"license": "other"}
    return license_keys


def _build_front_matter(facts: CardFacts, params: Params) -> dict[str, Any]:
    # https://huggingface.co/docs/hub/model-cards#model-card-metadata; only what is on the hub has a name there.
    front: dict[str, Any] = {}
    if facts.model.get("id"):
        front |= {"base_model": facts.model["id"], "base_model_relation": "quantized"}
    sources = [facts.dataset, *facts.dataset.get("datasets", [])]  # the parts of a mixture
    if ids := [source["id"] for source in sources if source.get("id")]:
        front["datasets"] = ids
    tuning = "full" if params.training.tuning == "full" else "qlora" if params.quantization.load_in_4bit else "lora"
    return {
        **front,
        **facts.license,
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "lathe",
        "tags": ["gguf", "llama.cpp", "lathe", params.training.method, tuning],
    }


def _describe_source(fetched: Mapping[str, Any], digest: str) -> dict[str, str]:
    """Return the name of a model or dataset in a sentence, and its full origin."""
    shown = str(fetched.get("id") or f"`{fetched['name']}`")
    source = fetched["source"] if not fetched.get("package") else f"{fetched['package']} {fetched['version']}"
    details = f" ({source})" if not fetched.get("id") else f", commit {fetched.get('commit')}"
    if fetched.get("gguf"):
        details += f", from `{fetched['gguf']}` ({fetched['quantization']}, SHA-256 {fetched['sha256']})"
    parts = [_describe_source(part, part["sha256"])["origin"] for part in fetched.get("datasets", [])]
    of_parts = f"; of {'; '.join(parts)}" if parts else ""
    return {"shown": shown, "origin": f"{shown}{details}, digest {digest}{of_parts}"}


def _build_row(
    name: str, scores: Mapping[str, Any], metrics: Sequence[str], quantized: Mapping[str, Any]
) -> dict[str, Any]:
    intervals = {entry["metric"]: entry for entry in scores.get("intervals", [])}
    shipped = name in quantized
    return {
        "name": f"`{name}{'.gguf' if name.isupper() else '/'}`" if shipped else f"({name})",
        "size": f"{scores['bytes'] / 1e6:,.2f} MB",
        "bits_per_weight": f"{quantized[name]['bits_per_weight']:.2f}" if shipped else "16",
        "scores": [_format_score(scores.get(metric), intervals.get(metric)) for metric in metrics],
        "perplexity": _format_number(scores.get("perplexity")),
        "kl": _format_number(scores.get("kl")),
    }


def _build_task(name: str, scores: ScoresByArtifact, quantized: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's scores by file, and the differences to the base."""
    first = next(iter(scores.values()))
    metrics = [key for key in first if key not in ("documents", "bytes", "lower_is_better", "intervals", "deltas")]
    rows = []
    for artifact, own in scores.items():
        intervals = {entry["metric"]: entry for entry in own["intervals"]}
        deltas = {entry["metric"]: entry for entry in own["deltas"] if entry["to"] == "base"}
        cells = []
        for metric in metrics:
            delta = deltas.get(metric)
            cells += [
                _format_score(own[metric], intervals.get(metric)),
                _format_score(delta["delta"], delta) if delta else "–",
            ]
        rows.append({"name": f"`{artifact}.gguf`" if artifact in quantized else f"({artifact})", "cells": cells})
    return {"name": name, "documents": f"{first['documents']:,}", "metrics": metrics, "rows": rows}


def _format_score(value: float | None, interval: Mapping[str, Any] | None) -> str:
    if value is None or interval is None or interval["low"] is None:
        return _format_number(value)
    return f"{_format_number(value)} ({_format_number(interval['low'])} – {_format_number(interval['high'])})"


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _describe_targets(lora: Lora) -> str:
    names = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return f"{names}, in the last {lora.num_layers} blocks" if lora.num_layers else names


def _list_training_facts(params: Params) -> list[tuple[str, str]]:
    training, lora = params.training, params.lora
    facts: list[tuple[str, Any]] = [("method", training.method), ("tuning", training.tuning)]
    if training.tuning == "lora":
        facts += [("r, lora_alpha", f"{lora.r}, {lora.lora_alpha:g}"), ("target_modules", _describe_targets(lora))]
        if lora.use_dora or lora.use_rslora:
            facts.append(("variant", "DoRA" if lora.use_dora else "rsLoRA"))
        base = f"4 bits ({params.quantization.bnb_4bit_quant_type})" if params.quantization.load_in_4bit else "16 bits"
        facts.append(("base in training", f"{base}; merged into 16 bits"))
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.num_train_epochs:g} epochs"
    in_a_pass = training.per_device_train_batch_size
    batch = str((1 if in_a_pass == "auto" else in_a_pass) * training.gradient_accumulation_steps)
    rate = f"{training.learning_rate:g}"
    if training.method != "sft":
        after = getattr(params, training.method)
        steps = (
            f"{after.num_train_epochs:g} epochs of pairs" if training.method == "dpo" else f"{after.max_steps} steps"
        )
        length = f"{after.sft_epochs:g} supervised epochs, then {steps}"
        rate = f"{rate}, then {after.learning_rate:g}"
        batch = f"{batch}, then {after.per_device_train_batch_size * after.gradient_accumulation_steps}"
    facts += [
        ("length", length),
        ("peak learning_rate", rate),
        ("rows per step and device", batch),
        ("precision", training.precision),
        ("seed", params.seed),
    ]
    return [(key, str(value).replace("|", r"\|")) for key, value in facts]
