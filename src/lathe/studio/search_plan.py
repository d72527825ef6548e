"""Study, sampler, objectives and pruner of a search as a form, made from the class that validates search files.

As with the space, the search file's text stays what counts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from lathe.common.errors import InputError
from lathe.config.gates import FEW_SHOT, QUANTIZED, UNQUANTIZED
from lathe.config.load import load
from lathe.experiments.search.search_file import Objective, Plan, Pruner
from lathe.studio.parameter_form import list_choices, parse_back, write_value
from lathe.studio.search_text import unwrap

# Keys of a search file that have a form of their own on the page.
_ELSEWHERE = {"objectives", "space", "pruner", "n_trials"}
DIRECTIONS = list_choices(Objective.model_fields["direction"].annotation)
MOST_OBJECTIVES = 8
# The same of a pruner that the text has not yet.
_NEW_PRUNER = {"min_steps": 50, "reduction": 3}


@dataclass(frozen=True)
class PlanField:
    """An input: a key of the search file, the text in it, and its choices where there are few."""

    name: str
    text: str
    choices: list[str]


@dataclass(frozen=True)
class PlanForm:
    """What a text says: fields of the study and its sampler, objectives by metric and direction, fields of the pruner.

    The pruner has no fields where the text has none.
    """

    fields: list[PlanField]
    objectives: list[tuple[str, str]]
    pruner: list[PlanField]


def read_plan(tree: Mapping[str, Any]) -> PlanForm:
    """Return the form of a search file's tree; what is missing or of another form there is empty here."""
    given = tree.get("objectives")
    rows = [row for row in given if isinstance(row, Mapping)] if isinstance(given, list) else []
    objectives = [(str(row.get("metric", "")), str(row.get("direction", ""))) for row in rows]
    pruner = tree.get("pruner")
    return PlanForm(
        _build_fields(_list_plan_fields(), tree),
        objectives[:MOST_OBJECTIVES],
        _build_fields(Pruner.model_fields.items(), pruner) if isinstance(pruner, Mapping) else [],
    )


def list_metrics() -> list[str]:
    """Return the scores that an objective may name with the parameters as they are."""
    params = load().params
    names = [name for name in UNQUANTIZED if name != FEW_SHOT]
    quantized = [*params.quantize.types, QUANTIZED]
    scores = [f"{name}.{score}" for name in quantized for score in (*params.scores, "bytes")]
    return [*scores, *(f"{name}.{score}" for name in names for score in params.scores if score != "kl")]


def write_plan(tree: Any, form: Mapping[str, str]) -> None:
    """Put a form's inputs into a search file's tree.

    They are named `plan:KEY`, `pruner:KEY`, `objective:NUMBER:metric` and `objective:NUMBER:direction`;
    `remove_objective` is the number of one, `add_objective` a metric, `use_pruner` true or false. Raises InputError
    where the text has other objectives than the form.
    """
    _write_fields(_list_plan_fields(), tree, form, "plan")
    _write_objectives(tree, form)
    wanted = form.get("use_pruner", "")
    if wanted == "false":
        tree.pop("pruner", None)
    elif isinstance(tree.get("pruner"), Mapping):
        _write_fields(Pruner.model_fields.items(), tree["pruner"], form, "pruner")
    elif wanted == "true":
        tree["pruner"] = CommentedMap(_NEW_PRUNER)
        tree["pruner"].fa.set_flow_style()


def _write_objectives(tree: Any, form: Mapping[str, str]) -> None:
    rows = tree.get("objectives")
    if not isinstance(rows, list):
        rows = tree["objectives"] = CommentedSeq()
    for number, row in enumerate(rows[:MOST_OBJECTIVES]):
        for key in ("metric", "direction"):
            text = form.get(f"objective:{number}:{key}")
            if text is not None and isinstance(row, dict) and text.strip() != str(row.get(key, "")):
                row[key] = text.strip()
    removed = form.get("remove_objective", "")
    if removed:
        if not (removed.isascii() and removed.isdigit() and int(removed) < len(rows)):
            raise InputError(
                f"objectives: the text has no number {removed[:20]!r}; load the page again", code="other-objectives"
            )
        del rows[int(removed)]
    if added := form.get("add_objective", "").strip():
        smaller_is_better = added.rpartition(".")[2] in {"bytes", "kl", "perplexity", "general_perplexity"}
        rows.append(CommentedMap({"metric": added, "direction": "minimize" if smaller_is_better else "maximize"}))


def _list_plan_fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, info in Plan.model_fields.items():
        if name not in _ELSEWHERE:
            yield name, info


def _build_fields(infos: Any, values: Mapping[str, Any]) -> list[PlanField]:
    return [
        PlanField(name, write_value(unwrap(values.get(name))), list_choices(info.annotation)) for name, info in infos
    ]


def _write_fields(infos: Any, tree: Any, form: Mapping[str, str], prefix: str) -> None:
    for name, _ in infos:
        text = form.get(f"{prefix}:{name}")
        if text is None or text.strip() == write_value(unwrap(tree.get(name))):
            continue
        value = parse_back(text)
        tree[name] = text.strip() if value is None and text.strip() not in {"", "null"} else value
