"""Card for the Hub: the model card with the names of the published files, scores as the Hub reads them, licences."""

import re
from collections.abc import Mapping, Sequence

from lathe.config.export_params import FORMATS
from lathe.config.params import Params
from lathe.evaluation.best_artifact import choose_best_artifact
from lathe.evaluation.metric_order import LOWER_IS_BETTER
from lathe.provenance.signed_statement import STATEMENT_FILE
from lathe.publishing.format_card import describe_formats, replace_use, set_metadata
from lathe.publishing.licences import SourceLicence

NOT_RESULTS = ("bytes", "engine", "intervals", "deltas")
MERGED = "merged"


def render_hub_card(
    repository: str,
    names: Mapping[str, str],
    params: Params,
    *,
    lineage: Mapping[str, str],
    licence: Mapping[str, str],
    licences: Sequence[SourceLicence],
    has_adapter: bool,
    signed: bool,
) -> str:
    """Return README.md: the card of the stage `card` on the files in `names`, by artifact, with the Hub's metadata.

    Scores of the test split become its evaluation results (`model-index`). An adapter alone has the relation `adapter`.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from lathe.reports.model_card import read_card_facts, render_model_card

    types = [name for name in params.quantize.types if name in names]
    formats = [name for name in params.export.formats if name in names]
    measured = [*params.quantize.types, *params.export.formats]
    facts = read_card_facts(measured, lineage=lineage, licence=licence)
    best = choose_best_artifact(facts.validation, types or params.quantize.types, params.evaluate.primary_metric)
    card = ModelCard(_name_files(render_model_card(facts, params, best), names, measured))
    assert isinstance(card.data, ModelCardData)
    if forbidding := next((one.licence for one in licences if one.is_non_commercial), None):
        card.data.license = forbidding  # of the data too: the base's alone would promise what is not so
    card.data.model_name = repository.split("/")[1]
    data = {"type": facts.dataset.get("id") or facts.dataset["name"], "name": facts.dataset["name"]}
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            task_name=f"text generation by {names[artifact] or artifact}",
            dataset_type=data["type"],
            dataset_name=data["name"],
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric}{' (lower is better)' if metric in LOWER_IS_BETTER else ''}, {artifact}",
            metric_value=value,
        )
        for artifact in names
        for metric, value in facts.test[artifact].items()
        if metric not in NOT_RESULTS and value is not None
    ] or None
    if not names:
        card.data.library_name = "peft"
        if card.data.base_model:
            card.data["base_model_relation"] = "adapter"
    text = card.text.rstrip("\n")
    text = text.replace("## Use\n", _describe_use(repository, names, best), 1) if types else text
    if formats:
        section = describe_formats(names, formats, repository)
        text = f"{text}\n\n{section.rstrip()}" if types or MERGED in names else replace_use(text, section)
        if len(formats) == len(names):
            set_metadata(card.data, formats)
    text += "\n\n" + "\n".join(_describe_origin(licences, has_adapter=has_adapter, signed=signed)) + "\n"
    card.text = text
    return str(card)


def _name_files(text: str, names: Mapping[str, str], types: Sequence[str]) -> str:
    """Put the published names in place of the pipeline's; a measured file that is not published is in brackets."""
    for artifact in types:
        name = re.escape(f"{artifact}{'/' if artifact in FORMATS else '.gguf'}")
        if artifact in names and artifact in FORMATS:
            text = text.replace(f"`{artifact}/`", f"`{names[artifact]}`" if names[artifact] else f"{artifact} (here)")
        elif artifact in names:
            text = re.sub(rf"(?<![\w.-]){name}", names[artifact], text)
        else:
            text = re.sub(rf"`{name}`", f"({artifact}, not published)", text)
    return text


def _describe_use(repository: str, names: Mapping[str, str], best: str) -> str:
    tag = best if best in names else "F16"
    return (
        "## Use\n\nFrom the Hub; LM Studio finds the files by the name of the repository:\n\n```\n"
        f"ollama run hf.co/{repository}:{tag}\nllama-cli -hf {repository}:{tag}\n```\n\nWith the files downloaded:\n"
    )


def _describe_origin(licences: Sequence[SourceLicence], *, has_adapter: bool, signed: bool) -> list[str]:
    lines = ["## Licences", "", *(f"* {one.describe()}" for one in licences)]
    if has_adapter:
        lines += ["", "## Adapter", "", "`adapter/` holds the LoRA adapter for PEFT, to be loaded on the base."]
    if signed:
        lines += [
            "",
            "## Signature",
            "",
            f"`{STATEMENT_FILE}` is an in-toto statement on every file here and what it was made from, signed with the "
            "publisher's key. With the public key, from a place that you trust:",
            "",
            "```",
            "lathe verify FOLDER --key KEY.pub",
            "```",
        ]
    return lines
