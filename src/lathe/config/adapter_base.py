"""Adapter in place of a model: a preset that names the folder of one is read as that of its base with the adapter."""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lathe.common import paths

if TYPE_CHECKING:
    from lathe.config.presets import ModelPreset

ADAPTER_CONFIG = "adapter_config.json"
_OWNER_AND_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")


def holds_adapter_alone(names: list[str]) -> bool:
    """Tell whether files are those of a PEFT adapter and of no model, by their names.

    Other programs save the base's config.json beside an adapter; what counts is whether weights of a model are there.
    """
    weights = [name for name in names if name.endswith(_WEIGHTS) and not name.startswith("adapter_model")]
    return ADAPTER_CONFIG in names and not ("config.json" in names and weights)


def resolve_adapter(preset: "ModelPreset") -> "ModelPreset":
    """Return the preset of base and adapter where a preset names the folder of an adapter, else the preset itself.

    The base is what `base_model_name_or_path` in adapter_config.json names: a folder under models/local, by its path
    from the root of the checkout or from beside the adapter, or else a repository of the Hub. Where it is neither, the
    preset is returned as it is, and `fetch` says why.
    """
    from lathe.config.presets import HubModel, LocalModel

    if not isinstance(preset, LocalModel) or preset.adapter:
        return preset
    folder = paths.ROOT / preset.path
    if not folder.is_dir() or not holds_adapter_alone(os.listdir(folder)):
        return preset
    named, revision = read_base_name(folder)
    if local := _find_local_base(named, PurePosixPath(os.path.normpath(preset.path))):
        return preset.model_copy(update={"path": local, "adapter": preset.path})
    if is_repository(named):
        return HubModel(
            source="hub", id=named, revision=revision, file=None, template=preset.template, adapter=preset.path
        )
    return preset


def read_base_name(folder: Path) -> tuple[str, str | None]:
    """Return what the folder of an adapter says of its base, `""` if nothing, and the revision of that."""
    try:
        content: Any = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return "", None
    named, revision = (
        content.get(key) if isinstance(content, dict) else None for key in ("base_model_name_or_path", "revision")
    )
    return named if isinstance(named, str) else "", revision if isinstance(revision, str) and revision else None


def is_repository(named: str) -> bool:
    """Tell whether a base's name can be a repository of the Hub; `models/…` is a folder of this checkout."""
    return bool(_OWNER_AND_NAME.fullmatch(named)) and not named.startswith("models/")


def _find_local_base(named: str, adapter: PurePosixPath) -> str | None:
    """Return the path, from the root, of a folder or file under models/local that a base's name means."""
    if not named or "\0" in named:
        return None
    for start in (paths.ROOT, paths.ROOT / adapter.parent):
        found = Path(os.path.normpath(start / named))
        if paths.MODELS_LOCAL in found.parents and found != paths.ROOT / adapter and found.exists():
            return found.relative_to(paths.ROOT).as_posix()
    return None
