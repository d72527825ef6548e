"""Proof of what training changed in the backbone: SHA-256 of every tensor before and after."""

from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InputError
from lathe.training.freeze_proof import hash_tensors

Digests = dict[str, str]


@dataclass(frozen=True)
class BackboneDigests:
    """The digests of a backbone's tensors: those that are frozen, and those that are trained."""

    frozen: Digests
    trained: Digests


def hash_backbone(backbone: Any) -> BackboneDigests:
    """Return the digests of all tensors of a backbone, an adapter's among them."""
    return BackboneDigests(hash_tensors(backbone), hash_tensors(backbone, trained=True))


def check_frozen(before: Digests, after: Digests) -> None:
    """Raise InputError, with the name of a tensor, unless all digests are the same."""
    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if moved:
        raise InputError(
            f"{len(moved)} frozen tensors of the backbone are not as they were before training, such as {moved[0]}; "
            "nothing was saved; run the stages fetch and features again, and then this one",
            code="frozen-tensor-moved",
        )


def make_proof(before: BackboneDigests, after: BackboneDigests) -> dict[str, Any]:
    """Return the content of freeze_proof.json.

    Raises InputError if a frozen tensor moved, or if the backbone was to be trained and none of it moved.
    """
    check_frozen(before.frozen, after.frozen)
    unmoved = sorted(name for name, digest in after.trained.items() if before.trained[name] == digest)
    if after.trained and len(unmoved) == len(after.trained):
        raise InputError(
            "no tensor of the backbone moved in training, though training.tuning says so; raise "
            "training.encoder_learning_rate or training.epochs",
            code="nothing-trained",
        )
    return {
        "frozen_tensors": len(after.frozen),
        "frozen_moved": [],
        "trained_tensors": len(after.trained),
        "trained_moved": len(after.trained) - len(unmoved),
        "trained_unmoved": unmoved,
        # A list, of which DVC makes no columns.
        "tensors": [
            {"tensor": name, "frozen": frozen, "before": then[name], "after": now[name]}
            for frozen, then, now in (
                (True, before.frozen, after.frozen),
                (False, before.trained, after.trained),
            )
            for name in now
        ],
    }
