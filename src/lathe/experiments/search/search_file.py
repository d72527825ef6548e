"""Search file: the parameters to search, the objectives, the sampler; validated like params.yaml."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config import gates
from lathe.config.base import Name, Positive, PositiveFloat, Section
from lathe.config.classifier_params import ClassifierParams
from lathe.config.load import check_value
from lathe.config.params import Params
from lathe.config.yaml_files import find_line, read_marked_yaml, read_yaml

CLASSIFIER_SCORES = ("accuracy", "macro_f1", "calibration_error")
LARGEST_GRID = 100_000  # points; the order of all is drawn at once
UNCOUNTED = 1e18  # points of one parameter, above which it does not matter how many

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class Float(Section):
    """A number from `low` to `high`, both included; `log`: sampled by its logarithm, `step`: in steps from `low`."""

    type: Literal["float"]
    low: FiniteFloat
    high: FiniteFloat
    log: bool = False
    step: PositiveFloat | None = None

    @property
    def has_points(self) -> bool:
        """Whether a grid can take it; `points` makes them all."""
        return self.step is not None

    @property
    def points(self) -> Sequence[float] | None:
        """The values that a grid takes; None without steps."""
        if self.step is None:
            return None
        return [self.low + index * self.step for index in range(self.count_points())]

    def count_points(self) -> int:
        """Return how many values a grid takes; at most as many as can be counted."""
        if self.step is None:
            return 1
        # Rounded: 0.1 goes three times into 0.3.
        return int(min((self.high - self.low) / self.step + 1e-9, UNCOUNTED)) + 1


class Int(Section):
    """A whole number from `low` to `high`, both included."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: Positive | None = None

    @property
    def has_points(self) -> bool:
        """Whether a grid can take it."""
        return not self.log

    @property
    def points(self) -> Sequence[int] | None:
        """The values that a grid takes; None if they are sampled by their logarithm."""
        return None if self.log else range(self.low, self.high + 1, self.step or 1)

    def count_points(self) -> int:
        """Return how many values a grid takes."""
        return 1 if self.log else max(0, (self.high - self.low) // (self.step or 1) + 1)


class Categorical(Section):
    """One of several values of whatever type the parameter has, lists included."""

    type: Literal["categorical"]
    choices: Annotated[list[Any], Field(min_length=1)]

    @property
    def has_points(self) -> bool:
        """Whether a grid can take it."""
        return True

    @property
    def points(self) -> Sequence[Any]:
        """The values that a grid takes."""
        return self.choices

    def count_points(self) -> int:
        """Return how many values a grid takes."""
        return len(self.choices)


Dimension = Annotated[Float | Int | Categorical, Field(discriminator="type")]


class Objective(Section):
    """A score of metrics/evaluate/validation.json, such as `Q4_K_M.exact_match`, and which way is better.

    The artifact `quantized` is the quantization type that scored worst: the only one, if a trial makes one.
    """

    metric: Annotated[str, Field(pattern=r"^\w+\.\w+$")]
    direction: Literal["maximize", "minimize"]

    def read_score(self, report: Mapping[str, Mapping[str, Any]], types: Sequence[str]) -> float:
        """Read the score from a report of `evaluate`; raises ValueError if there is none."""
        artifact, _, score = self.metric.partition(".")
        names = types if artifact == gates.QUANTIZED else [artifact]
        values = [report.get(name, {}).get(score) for name in names]
        scores = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        if not scores or len(scores) < len(values):
            raise ValueError(f"metrics/evaluate/validation.json has no {self.metric}")
        return float(min(scores) if self.direction == "maximize" else max(scores))


class Pruner(Section):
    """Successive halving on evaluation loss.

    Trials are compared after `min_steps`, `min_steps * reduction`, … optimizer steps, and of those so far the best one
    in `reduction` goes on.
    """

    min_steps: Positive
    reduction: Annotated[int, Field(ge=2)]


class Plan(Section):
    """The content of a search file; every key but `pruner` is required."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    sampler: Literal["tpe", "random", "grid"]
    startup_trials: Positive
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    n_trials: Positive
    timeout_seconds: PositiveFloat | None
    objectives: Annotated[list[Objective], Field(min_length=1)]
    space: Annotated[dict[Name, Dimension], Field(min_length=1)]
    pruner: Pruner | None = None

    @property
    def directions(self) -> dict[str, str]:
        """Which way each of the scores is better."""
        return {objective.metric: objective.direction for objective in self.objectives}

    @property
    def grid_size(self) -> int:
        """How many points a grid has; parameters without steps count as one."""
        return math.prod(dimension.count_points() for dimension in self.space.values())

    def fix_parameters(self, keys: Sequence[str]) -> "Plan":
        """Return the plan without some parameters, which overrides fix."""
        space = {key: dimension for key, dimension in self.space.items() if key not in keys}
        if not space:
            raise InputError(
                f"-S {', '.join(keys)}: nothing is left to search; leave one parameter of the file free",
                code="nothing-to-search",
            )
        return self.model_copy(update={"space": space})

    def check(self, params: Params | ClassifierParams, where: str) -> None:
        """Raise InputError if an objective is none of the scores that a trial has."""
        if self.pruner:
            self._check_pruner(params, where)
        if isinstance(params, ClassifierParams):
            self._check_classifier_scores(params, where)
            return
        type_lists = [params.quantize.types]
        if isinstance(searched := self.space.get("quantize.types"), Categorical):
            type_lists = searched.choices
        for objective in self.objectives:
            for types in type_lists:
                gate = gates.parse_gate(f"{objective.metric} > 0")
                try:
                    gates.check_names(gate, types=types, scores=params.scores)
                except ValueError as error:
                    rule = str(error).partition(" names ")[2] or str(error)
                    raise InputError(
                        f"{where}: objectives: {objective.metric} names {rule}", code="unknown-objective"
                    ) from None

    def _check_pruner(self, params: Params | ClassifierParams, where: str) -> None:
        reason = ""
        if len(self.objectives) > 1:
            reason = "there are several objectives, and one evaluation loss"
        elif isinstance(params, ClassifierParams):
            reason = "the classifier's pipeline has no curve of evaluation loss by optimizer steps"
        elif params.training.method != "sft" or "training.method" in self.space:
            reason = "losses of dpo and grpo do not compare trials; training.method must be sft"
        if reason:
            raise InputError(f"{where}: pruner: {reason}; leave it out", code="no-pruning")

    def _check_classifier_scores(self, params: ClassifierParams, where: str) -> None:
        known = [*CLASSIFIER_SCORES]
        known += ["micro_f1"] if params.data.multi_label else []
        known += ["in_scope_accuracy", "none_recall"] if params.data.none_label else []
        for objective in self.objectives:
            name, _, score = objective.metric.partition(".")
            if name != "classifier" or score not in known:
                raise InputError(
                    f"{where}: objectives: {objective.metric} is no score of the classifier; write "
                    f"classifier.NAME with one of {', '.join(known)}",
                    code="unknown-objective",
                )


TOP_LEVEL: dict[str, type[Section]] = {"objectives": Objective, "pruner": Pruner}  # sections that are not of `space`


def read_plan(file: Path, params: Mapping[str, Any], name: str, section: type[Section] = Params) -> Plan:
    """Read a search file, which messages call `name`, and validate it against the current parameters.

    `section` is the class of the parameters.

    Raises InputError with one line per problem: file, line, key, value, rule and remedy.
    """
    tree = read_yaml(file)
    marked = read_marked_yaml(file)  # knows the line of every key

    try:
        plan = Plan.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{_locate(name, marked, problem['loc'])}: {_describe_problem(problem, tree)}" for problem in error.errors()
        ]
        raise InputError("\n".join(dict.fromkeys(lines)), code="invalid-search-file") from None
    problems = [
        problem
        for key, dimension in plan.space.items()
        for problem in _check_dimension(key, dimension, params, _locate(name, marked, ("space", key)), section)
    ]
    if plan.sampler == "grid" and not problems:
        problems = list(_check_grid(plan, name, marked))
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)), code="invalid-search-file")
    return plan


def _check_dimension(
    key: str, dimension: Float | Int | Categorical, params: Mapping[str, Any], where: str, section: type[Section]
) -> list[str]:
    values = dimension.choices if isinstance(dimension, Categorical) else [dimension.low, dimension.high]
    problems = [problem for value in values for problem in check_value(key, value, dict(params), where, section)]
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


def _check_grid(plan: Plan, name: str, marked: Any) -> Iterator[str]:
    for key, dimension in plan.space.items():
        if not dimension.has_points:
            yield (
                f"{_locate(name, marked, ('space', key))}: space.{key}: a grid needs points; give it a step and no "
                "log, or take type categorical with choices"
            )
    if (size := plan.grid_size) > LARGEST_GRID:
        yield f"{_locate(name, marked, ('space',))}: the grid has {size:,} points; {LARGEST_GRID:,} are the most"


def _locate(file: str, marked: Any, location: Sequence[Any]) -> str:
    return f"{file}:{find_line(marked, location)}"


def _describe_problem(problem: Any, tree: Any) -> str:
    path = [step for step in problem["loc"] if step not in ("float", "int", "categorical")]
    key, given = ".".join(map(str, path)) or "the whole file", problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            kinds: dict[str, type[Section]] = {"float": Float, "int": Int, "categorical": Categorical}
            kind = next((step for step in problem["loc"] if step in kinds), None)
            section = kinds[kind] if kind else TOP_LEVEL.get(str(path[0]), Plan)
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
