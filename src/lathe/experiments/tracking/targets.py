"""Where runs are mirrored to: the section `tracking` of params.yaml, and the environment, which wins."""

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lathe.common.errors import InputError, missing_extra
from lathe.config.base import plain_address
from lathe.config.params import Tracking

Name = Literal["mlflow", "wandb"]

_SWITCH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True)
class MlflowTarget:
    """An experiment of an MLflow server. User, password and token are the client's to read from the environment."""

    tracking_uri: str
    experiment_name: str
    name: Name = "mlflow"

    def __str__(self) -> str:
        return f"MLflow at {self.tracking_uri}, experiment {self.experiment_name}"


@dataclass(frozen=True)
class WandbTarget:
    """A project of Weights & Biases. The key is the client's to read from the environment."""

    mode: str
    project: str
    name: Name = "wandb"

    def __str__(self) -> str:
        return f"W&B {self.mode}, project {self.project}"


Target = MlflowTarget | WandbTarget


def targets(
    tracking: Tracking, environment: Mapping[str, str], *, asked: Collection[str] = ()
) -> tuple[list[Target], list[str]]:
    """Return where runs go, and for each variable of the environment that overrides params.yaml a line that says so.

    `asked` names the only ones that are wanted, enabled or not. Raises InputError for a variable of no use, and
    for a tracker whose package is not installed.
    """
    overrides: list[str] = []

    def chosen(key: str, variable: str, written: str) -> str:
        value = environment.get(variable) or written
        if value != written:
            overrides.append(f"tracking.{key} is {value!r}, by {variable} of the environment")
        return value

    mlflow, wandb = tracking.mlflow, tracking.wandb
    enabled = {"mlflow": mlflow.enabled, "wandb": wandb.enabled}
    if switch := environment.get("MLFLOW_ENABLED"):
        if switch.lower() not in _SWITCH:
            raise InputError(f"MLFLOW_ENABLED is {switch!r}; must be one of {', '.join(_SWITCH)}")
        enabled["mlflow"] = _SWITCH[switch.lower()]
    mode = environment.get("WANDB_MODE") or (wandb.mode if wandb.enabled else "disabled")
    if mode not in ("online", "offline", "disabled"):
        raise InputError(f"WANDB_MODE is {mode!r}; must be one of online, offline, disabled")
    enabled["wandb"] = mode != "disabled"
    for name, variable, written in (
        ("mlflow", "MLFLOW_ENABLED", mlflow.enabled),
        ("wandb", "WANDB_MODE", wandb.enabled),
    ):
        if enabled[name] != written:
            overrides.append(f"tracking.{name}.enabled is {enabled[name]}, by {variable} of the environment")
    found: list[Target] = []
    if "mlflow" in asked or (enabled["mlflow"] and not asked):
        uri = chosen("mlflow.tracking_uri", "MLFLOW_TRACKING_URI", mlflow.tracking_uri)
        try:
            plain_address(uri)
        except ValueError as error:
            raise InputError(f"MLFLOW_TRACKING_URI: {error}, MLFLOW_TRACKING_PASSWORD for one") from None
        experiment = chosen("mlflow.experiment_name", "MLFLOW_EXPERIMENT_NAME", mlflow.experiment_name)
        found.append(MlflowTarget(uri.rstrip("/"), experiment))
    if "wandb" in asked or (enabled["wandb"] and not asked):
        if wandb.enabled and mode != "disabled":
            chosen("wandb.mode", "WANDB_MODE", wandb.mode)
        found.append(WandbTarget(mode if mode != "disabled" else wandb.mode, wandb.project))
    for target in found:
        package = importlib.util.find_spec(target.name)
        if package is None or package.origin is None:  # without an origin it is the folder of W&B's runs
            missing = missing_extra(ModuleNotFoundError(name=target.name))
            assert missing
            raise missing
    return found, overrides


def as_json(target: Target) -> dict[str, Any]:
    """Return what `from_json` takes."""
    return asdict(target)


def from_json(tree: dict[str, Any]) -> Target:
    """Return the target that `as_json` wrote."""
    return MlflowTarget(**tree) if tree["name"] == "mlflow" else WandbTarget(**tree)
