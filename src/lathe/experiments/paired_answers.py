"""Paired answers: the rows that two revisions both answered, on which a difference can be tested."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lathe.provenance.revisions import Revision


class PairedAnswers(NamedTuple):
    """The answers of both to the same rows, in one order; none where nothing can be tested, as `warnings` say."""

    ours: list[Any]
    theirs: list[Any]
    warnings: list[str]


def pair_answers(
    revisions: Sequence[Revision], answers: Sequence[Mapping[Any, Any] | None], *, called: str, rows: str, dvc: str
) -> PairedAnswers:
    """Pair the answers of two revisions by their rows; None stands for those that DVC's cache has not got.

    In warnings, `called` is what the answers are called, `rows` what was answered, and `dvc` the command of DVC.
    """
    for revision, answered in zip(revisions, answers, strict=True):
        if answered is None:
            problem = (
                f"the {called} of {revision.name} are not in DVC's cache; `{dvc} fetch` or `{dvc} exp pull` brings them"
            )
            return PairedAnswers([], [], [f"{problem}; without them nothing is tested"])
    ours, theirs = (answered or {} for answered in answers)
    common = [key for key in ours if key in theirs]
    warnings = []
    if len(common) < max(len(ours), len(theirs)):
        first, other = (revision.name for revision in revisions)
        counts = f"{first} answered {len(ours)} {rows} and {other} {len(theirs)}"
        outcome = "differences are of these" if common else "nothing can be tested"
        warnings.append(f"{counts}, {len(common)} of them the same; {outcome}")
    return PairedAnswers([ours[key] for key in common], [theirs[key] for key in common], warnings)
