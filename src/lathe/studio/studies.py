"""Searches: studies read from Optuna's storage, search files, and requests as the replaced service took them."""

import io
import os
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from ruamel.yaml import YAML

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.scratch import temporary_folder
from lathe.common.text import did_you_mean
from lathe.config import overrides as overriding
from lathe.config.load import load
from lathe.config.presets import HubModel, Presets
from lathe.config.yaml_files import read_yaml
from lathe.experiments.recipes import list_recipes, read_overrides
from lathe.experiments.search import search_file, storage
from lathe.experiments.search.study import EXPERIMENT, REASON, SETTING, SURPLUS
from lathe.experiments.search.trial import name_experiment
from lathe.studio.actions import FEWEST_TRIALS, MOST_TRIALS, build_search, check_name

FOLDER = paths.ROOT / "experiments/search"
FEWEST_FOR_IMPORTANCE = 4
LONGEST_FILE = 100_000  # characters

# What a request that names a provider alone means: as docs/judge.md recommends. `provider:model` names another model.
JUDGE_MODELS: dict[str, dict[str, Any]] = {
    "gemini": {"judge.model": "gemini-2.5-flash", "judge.max_tokens": 2000},
    "gigachat": {"judge.model": "GigaChat-2-Max"},
    "openai": {"judge.model": "gpt-4o-mini"},
}


class FineTuningParams(BaseModel):
    """Settings of a fine-tuning request."""

    model_config = ConfigDict(extra="forbid")

    use_llm_judge: bool = Field(description="score the answers with a judge, and search for what it scores best")
    judge_model_id: str | None = Field(
        None, max_length=200, description="gemini, openai or gigachat, or PROVIDER:MODEL; needed with use_llm_judge"
    )
    base_model_name: str = Field(max_length=200, description="OWNER/NAME on the Hub, or a preset of presets.yaml")
    n_trials: Annotated[int, Field(ge=FEWEST_TRIALS, le=MOST_TRIALS)]


class FineTuningRequest(BaseModel):
    """A fine-tuning request, in the form of the service that Lathe replaces."""

    model_config = ConfigDict(extra="forbid")

    project_id: Annotated[int, Field(ge=0, le=10**12)]
    fine_tuning_params: FineTuningParams


def list_search_files() -> list[str]:
    """Return the search files by their paths from the top."""
    return sorted(file.relative_to(paths.ROOT).as_posix() for file in FOLDER.glob("*.yaml"))


def list_studies() -> list[str]:
    """Return the studies that have a journal here."""
    return sorted(file.stem for file in storage.JOURNALS.glob("*.journal"))


def read_study(name: str) -> dict[str, Any]:
    """Return a study: objectives, trials as far as they are, importances. Raises InputError if there is none."""
    import optuna

    url = os.environ.get(storage.VARIABLE) or None
    check_name(name, "study")
    if url is None and name not in list_studies():
        raise InputError(f"{name}: no such study here; {did_you_mean(name, list_studies())}", code="no-such-study")
    with storage.translate_connection_errors(url):
        try:
            study = optuna.load_study(study_name=name, storage=storage.open_storage(url, name))
        except KeyError:
            raise InputError(f"{name}: no such study in the storage; see the list", code="no-such-study") from None
        trials = [one for one in study.get_trials(deepcopy=False) if SURPLUS not in one.user_attrs]
        directions = [direction.name.lower() for direction in study.directions]
        metrics = list(study.user_attrs.get(SETTING, {}).get("objectives", {}))
        metrics = metrics or [f"score {number}" for number in range(len(directions))]
        scored = [one for one in trials if one.values]
        best = {one.number for one in study.best_trials} if scored else set()
        return {
            "study": name,
            "metrics": metrics,
            "directions": directions,
            "finished": sum(one.state.is_finished() for one in trials),
            "importance": _measure_importances(study, scored),
            "trials": [
                {
                    "number": one.number,
                    "experiment": name_experiment(name, one.number),
                    "state": one.state.name.lower(),
                    "parameters": one.params,
                    "scores": list(one.values or []),
                    "best": one.number in best,
                    "reason": one.user_attrs.get(REASON),
                    "commit": one.user_attrs.get(EXPERIMENT),
                    "seconds": one.duration.total_seconds() if one.duration else None,
                }
                for one in trials
            ],
        }


def _measure_importances(study: Any, scored: list[Any]) -> dict[str, float]:
    from optuna.importance import get_param_importances

    values = [one.values[0] for one in scored]
    if len(values) < FEWEST_FOR_IMPORTANCE or min(values) == max(values):
        return {}
    target = None if len(study.directions) == 1 else (lambda one: one.values[0])
    return dict(get_param_importances(study, target=target))


def check_search_text(text: str, overrides: Sequence[str] = ()) -> search_file.Plan:
    """Return the plan of a search file's text, whose trials run with `overrides`.

    Raises InputError with a line for each problem.
    """
    if len(text) > LONGEST_FILE:
        raise InputError(f"the search file has {len(text):,} characters; at most {LONGEST_FILE:,}", code="too-long")
    params = overriding.apply_overrides(overrides).params
    with temporary_folder(paths.SCRATCH / "studio", "search") as folder:
        file = folder / "search.yaml"
        file.write_text(text, encoding="utf-8")
        plan = search_file.read_plan(file, params.model_dump(), "search file")
        plan.check(params, "search file")
    return plan


def save_search_text(text: str, overrides: Sequence[str]) -> str:
    """Check a search file's text, write it into experiments/search by its study's name, and return its path.

    Raises InputError if it is not valid, or if there is another file of that name.
    """
    plan = check_search_text(text, overrides)
    file = FOLDER / f"{plan.study}.yaml"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{file.relative_to(paths.ROOT)}: is there already, with other content; choose another study name",
            code="file-exists",
        )
    with paths.replace_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file.relative_to(paths.ROOT).as_posix()


def prepare_fine_tuning(request: FineTuningRequest) -> tuple[str, list[str]]:
    """Write the search file of a request; return the study's name and the command that runs it.

    Values for the base come from a recipe of it, where there is one. Raises InputError for a model or judge that is not
    known here.
    """
    wanted = request.fine_tuning_params
    model = _find_model(wanted.base_model_name)
    tree = YAML().load((FOLDER / "default.yaml").read_text(encoding="utf-8"))
    searched = set(tree["space"])
    values = _read_recipe_of(model)
    project = f"project-{request.project_id}"
    values |= {"model": model}
    if project in read_yaml(paths.PRESETS)["datasets"]:
        values |= {"dataset": project}
    if wanted.use_llm_judge:
        values |= _choose_judge(wanted.judge_model_id)
    given = [overriding.format_override(key, value) for key, value in values.items() if key not in searched]
    types = overriding.apply_overrides(given).params.quantize.types
    for objective in tree["objectives"]:
        artifact, _, score = objective["metric"].partition(".")
        artifact = artifact if artifact in types else "quantized"
        objective["metric"] = f"{artifact}.{'judge' if wanted.use_llm_judge else score}"
    taken = {file.stem for file in FOLDER.glob("*.yaml")} | set(list_studies())
    number, study = 1, project
    while study in taken:
        number += 1
        study = f"{project}-{number}"
    tree["study"], tree["n_trials"] = study, wanted.n_trials
    file = FOLDER / f"{study}.yaml"
    command = build_search(file.relative_to(paths.ROOT).as_posix(), wanted.n_trials, 1, given)
    out = io.StringIO()
    YAML().dump(tree, out)
    check_search_text(out.getvalue(), given)
    with paths.replace_file(file) as partial:
        partial.write_text(out.getvalue(), encoding="utf-8")
    return study, command


def _find_model(name: str) -> str:
    """Return the preset of a model by its own name, or by that of its repository on the Hub."""
    models = Presets.model_validate(read_yaml(paths.PRESETS)).models
    if name in models:
        return name
    for preset, entry in models.items():
        if getattr(entry, "id", None) == name:
            return preset
    known = [*models, *(entry.id for entry in models.values() if isinstance(entry, HubModel))]
    raise InputError(
        f"base_model_name {name[:100]!r}: no preset of presets.yaml has this name or repository; "
        f"{did_you_mean(name, known)}",
        code="unknown-model",
    )


def _read_recipe_of(model: str) -> dict[str, Any]:
    """Return the overrides of the first recipe that trains answers with this model; none if there is no such recipe."""
    for name in list_recipes():
        try:
            values = read_overrides(paths.ROOT / f"experiments/{name}.yaml")
        except InputError:
            continue
        if values.get("model") == model and values.get("training.method", "sft") == "sft":
            return dict(values)
    return {}


def _choose_judge(given: str | None) -> dict[str, Any]:
    if not given:
        raise InputError(
            "judge_model_id is missing, and use_llm_judge is true; name gemini, openai, gigachat or PROVIDER:MODEL",
            code="missing-judge",
        )
    provider, _, model = given.partition(":")
    settings = load().params.judge
    if provider not in (*JUDGE_MODELS, "gguf") or not re.fullmatch(r"[\w./:+-]*", model):
        raise InputError(
            f"judge_model_id {given[:80]!r}: must be one of {', '.join(JUDGE_MODELS)}, or PROVIDER:MODEL",
            code="unknown-judge",
        )
    chosen = {"judge.enabled": True, "judge.provider": provider}
    if model:
        return {**chosen, "judge.model": model}
    if settings.provider == provider:  # the model of params.yaml
        return chosen
    if provider not in JUDGE_MODELS:
        raise InputError("judge_model_id gguf: needs a file; write gguf:PATH", code="unknown-judge")
    return {**chosen, **JUDGE_MODELS[provider]}
