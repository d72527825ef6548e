"""Targets of mirrors: the section `tracking` of params.yaml, overridden by the environment."""

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lathe.common.errors import InputError, missing_extra
from lathe.config.base import check_plain_address
from lathe.config.params import Tracking

TrackerName = Literal["mlflow", "wandb"]

_SWITCH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True)
class MlflowTarget:
    """An experiment of an MLflow server. The client reads user, password and token from the environment."""

    tracking_uri: str
    experiment_name: str
    name: TrackerName = "mlflow"

    def __str__(self) -> str:
        return f"MLflow at {self.tracking_uri}, experiment {self.experiment_name}"


@dataclass(frozen=True)
class WandbTarget:
    """A project of Weights & Biases. The client reads the key from the environment."""

    mode: str
    project: str
    name: TrackerName = "wandb"

    def __str__(self) -> str:
        return f"W&B {self.mode}, project {self.project}"


Target = MlflowTarget | WandbTarget


def choose_targets(
    tracking: Tracking, environment: Mapping[str, str], *, only: Collection[str] = ()
) -> tuple[list[Target], list[str]]:
    """Return the targets, and a message for each variable of the environment that overrides params.yaml.

    `only` names the wanted ones, enabled or not. Raises InputError for a variable with an invalid value, and for a
    tracker whose package is not installed.
    """
    overrides: list[str] = []

    def override(key: str, variable: str, written: str) -> str:
        value = environment.get(variable) or written
        if value != written:
            overrides.append(f"tracking.{key} is {value!r}, by {variable} of the environment")
        return value

    mlflow, wandb = tracking.mlflow, tracking.wandb
    enabled = {"mlflow": mlflow.enabled, "wandb": wandb.enabled}
    if switch := environment.get("MLFLOW_ENABLED"):
        if switch.lower() not in _SWITCH:
            raise InputError(
                f"MLFLOW_ENABLED is {switch!r}; must be one of {', '.join(_SWITCH)}", code="invalid-variable"
            )
        enabled["mlflow"] = _SWITCH[switch.lower()]
    mode = environment.get("WANDB_MODE") or (wandb.mode if wandb.enabled else "disabled")
    if mode not in ("online", "offline", "disabled"):
        raise InputError(f"WANDB_MODE is {mode!r}; must be one of online, offline, disabled", code="invalid-variable")
    enabled["wandb"] = mode != "disabled"
    for name, variable, written in (
        ("mlflow", "MLFLOW_ENABLED", mlflow.enabled),
        ("wandb", "WANDB_MODE", wandb.enabled),
    ):
        if enabled[name] != written:
            overrides.append(f"tracking.{name}.enabled is {enabled[name]}, by {variable} of the environment")
    chosen: list[Target] = []
    if "mlflow" in only or (enabled["mlflow"] and not only):
        uri = override("mlflow.tracking_uri", "MLFLOW_TRACKING_URI", mlflow.tracking_uri)
        try:
            check_plain_address(uri)
        except ValueError as error:
            raise InputError(
                f"MLFLOW_TRACKING_URI: {error}, MLFLOW_TRACKING_PASSWORD for one", code="invalid-variable"
            ) from None
        experiment = override("mlflow.experiment_name", "MLFLOW_EXPERIMENT_NAME", mlflow.experiment_name)
        chosen.append(MlflowTarget(uri.rstrip("/"), experiment))
    if "wandb" in only or (enabled["wandb"] and not only):
        if wandb.enabled and mode != "disabled":
            override("wandb.mode", "WANDB_MODE", wandb.mode)
        chosen.append(WandbTarget(mode if mode != "disabled" else wandb.mode, wandb.project))
    for target in chosen:
        package = importlib.util.find_spec(target.name)
        if package is None or package.origin is None:  # without an origin it is the folder of W&B's runs
            missing = missing_extra(ModuleNotFoundError(name=target.name))
            assert missing
            raise missing
    return chosen, overrides


def to_json(target: Target) -> dict[str, Any]:
    """Return what `from_json` takes."""
    return asdict(target)


def from_json(tree: dict[str, Any]) -> Target:
    """Return the target that `as_json` wrote."""
    return MlflowTarget(**tree) if tree["name"] == "mlflow" else WandbTarget(**tree)
