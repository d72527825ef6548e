"""A search file: what is searched, for which scores, and how; read and refused like the parameters themselves."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError
from ruamel.yaml import YAML

from lathe import gates
from lathe.errors import InputError
from lathe.params import Name, Params, Positive, PositiveFloat, Section, did_you_mean, problems_of, read_yaml

if TYPE_CHECKING:
    import optuna


class Float(Section):
    """A number between two others, both included; `log`: by its logarithm, `step`: in steps from `low`."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: PositiveFloat | None = None


class Int(Section):
    """A whole number between two others, both included."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: Positive | None = None


class Categorical(Section):
    """One of several values, of whatever kind the parameter takes: lists too."""

    type: Literal["categorical"]
    choices: Annotated[list[Any], Field(min_length=1)]


Dimension = Annotated[Float | Int | Categorical, Field(discriminator="type")]


class Objective(Section):
    """A score of metrics/evaluate/validation.json, such as `Q4_K_M.exact_match`, and which way is better.

    The artifact `quantized` is whichever quantization type scored worst: the only one, where a trial makes one.
    """

    metric: Annotated[str, Field(pattern=r"^\w+\.\w+$")]
    direction: Literal["maximize", "minimize"]

    def value(self, report: Mapping[str, Mapping[str, Any]], types: Sequence[str]) -> float:
        """Read the score from a report of `evaluate`; raises ValueError where there is none."""
        artifact, _, score = self.metric.partition(".")
        found = [report.get(name, {}).get(score) for name in (types if artifact == gates.QUANTIZED else [artifact])]
        scores = [value for value in found if isinstance(value, int | float)]
        if not scores or len(scores) < len(found):
            raise ValueError(f"metrics/evaluate/validation.json has no {self.metric}")
        return float(min(scores) if self.direction == "maximize" else max(scores))


class Plan(Section):
    """The whole of a search file; every key must be there."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    sampler: Literal["tpe", "random", "grid"]
    startup_trials: Positive
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    n_trials: Positive
    timeout_seconds: PositiveFloat | None
    objectives: Annotated[list[Objective], Field(min_length=1)]
    space: Annotated[dict[Name, Dimension], Field(min_length=1)]

    def without(self, keys: Sequence[str]) -> "Plan":
        """Return the plan with parameters fixed: they are not searched."""
        space = {key: dimension for key, dimension in self.space.items() if key not in keys}
        if not space:
            raise InputError(f"-S {', '.join(keys)}: nothing is left to search; leave one parameter of the file free")
        return self.model_copy(update={"space": space})

    def check(self, params: Params, where: str) -> None:
        """Raise InputError where an objective is not among the scores that a trial has."""
        type_lists = [params.quantize.types]
        if isinstance(searched := self.space.get("quantize.types"), Categorical):
            type_lists = searched.choices
        for objective in self.objectives:
            for types in type_lists:
                gate = gates.parse(f"{objective.metric} > 0")
                try:
                    gates.check(gate, types=types, scores=params.scores)
                except ValueError as error:
                    rule = str(error).partition(" names ")[2] or str(error)
                    raise InputError(f"{where}: objectives: {objective.metric} names {rule}") from None


def read(file: Path, params: Mapping[str, Any], name: str) -> Plan:
    """Read a search file, which messages call `name`, and hold it against the parameters as they are.

    Raises InputError with one line per problem: file, line, key, value, rule and remedy.
    """
    tree = read_yaml(file)
    with file.open(encoding="utf-8") as text:
        marked = YAML().load(text)  # knows the line of every key

    try:
        plan = Plan.model_validate(tree)
    except ValidationError as error:
        lines = [f"{_where(name, marked, problem['loc'])}: {_sentence(problem, tree)}" for problem in error.errors()]
        raise InputError("\n".join(dict.fromkeys(lines))) from None
    problems = [
        problem
        for key, dimension in plan.space.items()
        for problem in _of_dimension(key, dimension, params, _where(name, marked, ("space", key)))
    ]
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return plan


def suggested(plan: Plan, trial: "optuna.Trial") -> dict[str, Any]:
    """Return the value of every parameter in a trial: what it has already, or what the study's sampler suggests."""
    values: dict[str, Any] = {}
    for key, dimension in plan.space.items():
        match dimension:
            case Float(low=low, high=high, log=log, step=step):
                values[key] = trial.suggest_float(key, low, high, log=log, step=step)
            case Int(low=low, high=high, log=log, step=step):
                values[key] = trial.suggest_int(key, low, high, log=log, step=step or 1)
            case Categorical(choices=choices):
                texts = [_told(choice) for choice in choices]
                values[key] = choices[texts.index(trial.suggest_categorical(key, texts))]
    return values


def sampler(plan: Plan, number: int, params: Mapping[str, Any]) -> "optuna.samplers.BaseSampler":
    """Return what suggests the parameters of one trial.

    It is seeded by the trial's own number, so that neither a driver that starts anew nor one beside it draws the same
    numbers again. The model-based search begins with the parameters as they are, where they lie in the space.
    """
    from optuna.samplers import PartialFixedSampler, RandomSampler, TPESampler

    seed = plan.seed + number
    match plan.sampler:
        case "grid":
            return PartialFixedSampler(grid_point(plan, number), RandomSampler(seed))
        case "random":
            return RandomSampler(seed)
    tpe = TPESampler(seed=seed, constant_liar=True, n_startup_trials=plan.startup_trials)
    return PartialFixedSampler(_as_they_are(plan, params), tpe) if number == 0 else tpe


def grid_point(plan: Plan, number: int) -> dict[str, Any]:
    """Return a point of the grid as Optuna is told it; the order is drawn by the seed, each point comes once."""
    lists = {key: _points(key, dimension) for key, dimension in plan.space.items()}
    index = random.Random(plan.seed).sample(range(grid_size(plan)), grid_size(plan))[number]
    point = {}
    for key, values in lists.items():
        index, place = divmod(index, len(values))
        point[key] = values[place]
    return point


def grid_size(plan: Plan) -> int:
    """Return how many points the grid has."""
    size = 1
    for key, dimension in plan.space.items():
        size *= len(_points(key, dimension))
    return size


def override(key: str, value: Any) -> str:
    """Return `KEY=VALUE` as `dvc exp run -S` reads it, in Hydra's grammar."""
    return f"{key}={_in_hydras_grammar(value)}"


def _in_hydras_grammar(value: Any) -> str:
    match value:
        case str():
            # There a backslash is one, but before a quote.
            return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), value) + "'"
        case list():
            return f"[{','.join(map(_in_hydras_grammar, value))}]"
        case dict():
            return "{" + ",".join(f"{key}:{_in_hydras_grammar(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def _told(choice: Any) -> Any:
    # Optuna keeps plain values alone.
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def _points(key: str, dimension: Float | Int | Categorical) -> list[Any]:
    match dimension:
        case Categorical(choices=choices):
            return [_told(choice) for choice in choices]
        case Int(low=low, high=high, log=False, step=step):
            return list(range(low, high + 1, step or 1))
        case Float(low=low, high=high, log=False, step=float(step)):
            return [low + index * step for index in range(int((high - low) / step + 1e-9) + 1)]
    raise InputError(f"space.{key}: a grid needs points; give it a step, or take type categorical with choices")


def _as_they_are(plan: Plan, params: Mapping[str, Any]) -> dict[str, Any]:
    point: dict[str, Any] = {}
    for key, dimension in plan.space.items():
        value: Any = params
        for part in key.split("."):
            value = value[part]
        match dimension:
            case Categorical(choices=choices) if value in choices:
                point[key] = _told(value)
            case Float(low=low, high=high, step=None) | Int(low=low, high=high, step=None) if (
                isinstance(value, int | float) and low <= value <= high
            ):
                point[key] = value
    return point


def _of_dimension(key: str, dimension: Float | Int | Categorical, params: Mapping[str, Any], where: str) -> list[str]:
    values = dimension.choices if isinstance(dimension, Categorical) else [dimension.low, dimension.high]
    problems = [problem for value in values for problem in problems_of(key, value, dict(params), where)]
    if problems:
        return problems
    if isinstance(dimension, Categorical):
        twice = [choice for index, choice in enumerate(values) if choice in values[:index]]
        return [f"{where}: space.{key} lists {twice[0]!r} twice; name each choice once"] if twice else []
    if dimension.low >= dimension.high:
        return [f"{where}: space.{key}: low is {dimension.low} and high {dimension.high}; low must be below high"]
    if dimension.log and dimension.low <= 0:
        return [f"{where}: space.{key}: low is {dimension.low}; must be above 0 where log is true"]
    if dimension.log and dimension.step:
        return [f"{where}: space.{key}: step does not go with log; take one of them away"]
    if dimension.step and dimension.step > dimension.high - dimension.low:
        return [f"{where}: space.{key}: step is {dimension.step}, more than high - low; make it smaller"]
    return []


def _where(file: str, marked: Any, location: Sequence[Any]) -> str:
    line = 1
    for step in location:
        try:
            line = marked.lc.item(step)[0] + 1 if isinstance(step, int) else marked.lc.key(step)[0] + 1
            marked = marked[step]
        except (AttributeError, KeyError, TypeError):
            continue  # of a union's member, or missing
    return f"{file}:{line}"


def _sentence(problem: Any, tree: Any) -> str:
    path = [step for step in problem["loc"] if step not in ("float", "int", "categorical")]
    key, given = ".".join(map(str, path)) or "the whole file", problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            kinds: dict[str, type[Section]] = {"float": Float, "int": Int, "categorical": Categorical}
            kind = next((step for step in problem["loc"] if step in kinds), None)
            section = kinds[kind] if kind else Objective if path[0] == "objectives" else Plan
            return f"{key} is not a known key; {did_you_mean(str(path[-1]), list(section.model_fields))}"
        case "missing":
            return f"{key} is missing; add it, as experiments/search/default.yaml has it"
        case "union_tag_not_found" | "union_tag_invalid":
            return f"{key}: type must be one of float, int, categorical; add `type: float` for one"
        case "string_pattern_mismatch":
            example = "Q4_K_M.exact_match" if path[-1] == "metric" else "learning-rate"
            return f"{key} is {given!r}; must be written like {example!r}"
    rule = re.sub(r"^Input should be (a valid )?", "", problem["msg"])
    return f"{key} is {given!r}; must be {rule}"


# The variables of the set-up that Lathe replaces, and the parameters that they fix.
VARIABLES = {
    "LORA_MODEL_NAME": "model",
    "LORA_NUM_EPOCHS": "training.num_train_epochs",
    "LORA_BATCH_SIZE": "training.per_device_train_batch_size",
    "LORA_LEARNING_RATE": "training.learning_rate",
}
NUMBER_OF_TRIALS = "LORA_N_TRIALS"


@dataclass(frozen=True)
class Environment:
    """What the environment says about a search: overrides as on the command line, and the number of trials."""

    variables: dict[str, str]
    overrides: list[str]
    n_trials: int | None


def environment(variables: Mapping[str, str]) -> Environment:
    """Read the variables that are set and not empty; raises InputError where one is no number and must be."""
    given = {name: variables[name] for name in (*VARIABLES, NUMBER_OF_TRIALS) if variables.get(name)}
    for name, text in given.items():
        if name != "LORA_MODEL_NAME" and not re.fullmatch(r"\d+(\.\d*)?([eE][-+]?\d+)?|\.\d+", text):
            raise InputError(f"{name} is {text!r}; must be a number; set it right, or unset it")
    n_trials = given.get(NUMBER_OF_TRIALS)
    if n_trials is not None and not re.fullmatch(r"0*[1-9]\d{0,8}", n_trials):
        raise InputError(f"{NUMBER_OF_TRIALS} is {n_trials!r}; must be a whole number of trials, at least 1")
    overrides = [
        f"{key}={_in_hydras_grammar(given[name]) if key == 'model' else given[name]}"
        for name, key in VARIABLES.items()
        if name in given
    ]
    return Environment(given, overrides, int(n_trials) if n_trials else None)
