"""Rewards of the user's own: Python functions in the checkout's folder `rewards/`, or in an installed package.

A function takes an answer, its reference (both texts) and the processed row, and returns a number from 0 to 1.
"""

import importlib
import importlib.util
import inspect
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config.training_params import Reward

RewardFunction = Callable[[str, str, dict[str, Any]], float]


def load(rewards: Sequence[Reward], folder: Path) -> dict[str, RewardFunction]:
    """Return the functions that `rewards` name, by that name (MODULE:FUNCTION); MODULE is looked for in `folder` first.

    What they return is checked at every call. Raises InputError where one is missing or cannot be loaded or called.
    """
    return {reward.function: _checked(reward.function, folder) for reward in rewards if reward.function}


def source(function: RewardFunction) -> Path:
    """Return the file that a function of `load` is written in."""
    return Path(inspect.getfile(inspect.unwrap(function)))


def _checked(name: str, folder: Path) -> RewardFunction:
    module_name, _, function_name = name.partition(":")
    module = _module(name, module_name, folder)
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        known = [each for each, _ in inspect.getmembers(module, inspect.isfunction) if not each.startswith("_")]
        remedy = did_you_mean(function_name, known) if known else f"write `def {function_name}(...)`"
        raise InputError(f"grpo.rewards: {_shown(module)} has no function {function_name!r}; {remedy}")
    try:
        inspect.signature(function).bind("completion", "reference", {})
    except TypeError:
        given = f"{function_name}{inspect.signature(function)}"
        raise InputError(
            f"grpo.rewards: {_shown(module)} has {given}; a reward takes (completion, reference, row)"
        ) from None

    def checked(completion: str, reference: str, row: dict[str, Any]) -> float:
        try:
            value = function(completion, reference, row)
        except Exception as error:
            raise InputError(
                f"grpo.rewards: {name} raised {_what(error, module)} for {completion!r}; mend it"
            ) from error
        if not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
            raise InputError(
                f"grpo.rewards: {name} returned {value!r} for {completion!r}; a reward is a number from 0 to 1"
            )
        return float(value)

    checked.__wrapped__ = function  # type: ignore[attr-defined]
    return checked


def _module(name: str, module: str, folder: Path) -> ModuleType:
    file = folder.joinpath(*module.split(".")).with_suffix(".py")
    try:
        if not file.exists():
            return importlib.import_module(module)
        spec = importlib.util.spec_from_file_location(f"{folder.name}.{module}", file)
        assert spec
        assert spec.loader
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded  # as an import would: dataclasses and pickle look there
        spec.loader.exec_module(loaded)
        return loaded
    except ModuleNotFoundError as error:
        if error.name == module.split(".", maxsplit=1)[0]:
            raise InputError(
                f"grpo.rewards: {name!r}: there is no {folder.name}/{file.relative_to(folder)} and no installed "
                f"package {module}; add one of them"
            ) from None
        raise InputError(f"grpo.rewards: {name!r} cannot be loaded: {error}; install it") from error
    except Exception as error:
        raise InputError(
            f"grpo.rewards: {name!r} cannot be loaded: {type(error).__name__}: {error}; mend it"
        ) from error


def _what(error: Exception, module: ModuleType) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == module.__file__]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {error}"


def _shown(module: ModuleType) -> str:
    return Path(module.__file__).name if module.__file__ else module.__name__
