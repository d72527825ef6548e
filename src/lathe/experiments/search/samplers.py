"""Points of a space: what the samplers of Optuna suggest, a grid in an order of its own, the parameters as they are."""

import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lathe.common import dotted_keys
from lathe.experiments.search.search_file import Categorical, Float, Int, Plan

if TYPE_CHECKING:
    import optuna


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


def sampler(plan: Plan, place: int, params: Mapping[str, Any]) -> "optuna.samplers.BaseSampler":
    """Return what suggests the parameters of the trial at a `place` among those of the study, from 0.

    It is seeded by that place, so that neither a driver that starts anew nor one beside it draws the same numbers
    again. The model-based search begins with the parameters as they are, where they lie in the space.
    """
    from optuna.samplers import PartialFixedSampler, RandomSampler, TPESampler

    seed = plan.seed + place
    match plan.sampler:
        case "grid":
            return PartialFixedSampler(grid_point(plan, place), RandomSampler(seed))
        case "random":
            return RandomSampler(seed)
    tpe = TPESampler(seed=seed, constant_liar=True, n_startup_trials=plan.startup_trials)
    return PartialFixedSampler(_as_they_are(plan, params), tpe) if place == 0 else tpe


def grid_point(plan: Plan, place: int) -> dict[str, Any]:
    """Return a point of the grid as Optuna is told it; the order is drawn by the seed, each point comes once."""
    index = random.Random(plan.seed).sample(range(plan.grid_size), plan.grid_size)[place]
    point = {}
    for key, dimension in plan.space.items():
        if (points := dimension.points) is not None:
            index, at = divmod(index, len(points))
            point[key] = _told(points[at])
    return point


def _told(choice: Any) -> Any:
    # Optuna keeps plain values alone.
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def _as_they_are(plan: Plan, params: Mapping[str, Any]) -> dict[str, Any]:
    point: dict[str, Any] = {}
    for key, dimension in plan.space.items():
        value = dotted_keys.get_value(params, key)
        match dimension:
            case Categorical(choices=choices) if value in choices:
                point[key] = _told(value)
            case Float(low=low, high=high, step=None) | Int(low=low, high=high, step=None) if (
                isinstance(value, int | float) and low <= value <= high
            ):
                point[key] = value
    return point
