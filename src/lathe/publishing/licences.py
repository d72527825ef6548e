"""Licences of what is published: those of the base and of the data, and what forbids or restricts passing it on."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InputError

logger = logging.getLogger(__name__)

UNKNOWN = "not known"

_NON_COMMERCIAL = re.compile(
    r"(?:^|[-_ ])nc(?:[-_ ]|$)|non-?commercial|research[-_ ]only|amlr|research-license", re.IGNORECASE
)
_NO_DERIVATIVES = re.compile(r"(?:^|-)nd(?:-|$)", re.IGNORECASE)
_OF_THEIR_OWN = re.compile(r"^(?:other|unknown|llama\d|llama-|gemma$|.*-community)", re.IGNORECASE)
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class SourceLicence:
    """The licence of a base or a dataset, by the Hub's name of it; UNKNOWN if none is stated."""

    source: str
    licence: str
    link: str | None = None

    @property
    def is_non_commercial(self) -> bool:
        """Whether its name says that commercial use is forbidden."""
        return bool(_NON_COMMERCIAL.search(self.licence))

    @property
    def warnings(self) -> list[str]:
        """What whoever publishes must know of it."""
        found = []
        if self.licence == UNKNOWN:
            found.append("no licence is known: ask where it comes from before you pass it on")
        if self.is_non_commercial:
            found.append("NON-COMMERCIAL: what was made from it may not be used commercially either")
        if _NO_DERIVATIVES.search(self.licence):
            found.append("NO DERIVATIVES: what was made from it may not be passed on")
        if _OF_THEIR_OWN.match(self.licence):
            found.append(f"terms of its own: read them{f' at {self.link}' if self.link else ''}")
        return found

    def describe(self) -> str:
        """Return a line of text."""
        return "; ".join([f"{self.source}: {self.licence}", *self.warnings])


def find_licences(
    model: Mapping[str, Any], dataset: Mapping[str, Any], base_licence: Mapping[str, str]
) -> list[SourceLicence]:
    """Return the licences of the base, as its folder states it, and of each dataset, as the Hub does.

    `model` and `dataset` are the origins in metrics/fetch. A dataset that is not on the Hub has none that is known.
    """
    name = base_licence.get("license_name") or base_licence.get("license") or UNKNOWN
    found = [SourceLicence(f"base {model.get('id') or model['name']}", name, base_licence.get("license_link"))]
    for source in dataset.get("datasets") or [dataset]:
        licence = _ask_hub(source) if source.get("id") else None
        if source.get("source") == "builtin":
            licence = "apache-2.0"  # Lathe's own
        found.append(SourceLicence(f"data {source.get('id') or source['name']}", licence or UNKNOWN))
    return found


def _ask_hub(source: Mapping[str, Any]) -> str | None:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from lathe.sources.hub_answers import UNREADABLE, bound_answers

    try:
        with bound_answers():
            info = HfApi().dataset_info(source["id"], revision=source.get("commit"), timeout=_TIMEOUT_SECONDS)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError, OSError, InputError, *UNREADABLE) as error:
        logger.warning("%s: the hub cannot be asked for its licence (%s)", source["id"], type(error).__name__)
        return None
    stated = info.card_data.get("license") if info.card_data else None
    return ", ".join(stated) if isinstance(stated, list) else stated
