"""Paired answers: the rows that two revisions both answered, on which a difference can be tested."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lathe.common.dvc_api import DvcRepository
from lathe.common.jsonl import read_jsonl
from lathe.provenance.revisions import Revision

if TYPE_CHECKING:
    from lathe.evaluation.evaluate import AnswerRow


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


def read_answers(
    repo: DvcRepository, revision: Revision, artifact: str, split: str, *, clustered: bool = False
) -> dict[str, "AnswerRow"] | None:
    """Return a revision's answers by their prompts, with the scores of encoder and judge; None if one is not cached.

    With `clustered` they have the clusters of their rows.
    """
    from lathe.evaluation.clusters import CLUSTER

    files = [
        revision.find_cached_file(repo, "data/processed", f"{split}.jsonl"),
        revision.find_cached_file(repo, f"data/generated/{artifact}", f"{split}.jsonl"),
        revision.find_cached_file(repo, "data/scored", f"{artifact}/{split}.jsonl"),
    ]
    if any(file is None for file in files):
        return None
    examples, answers, scored = (read_jsonl(file) for file in files if file)
    scores_of = {row["row"]: row["scores"] for row in scored}
    rows: dict[str, AnswerRow] = {}
    counts: Counter[str] = Counter()
    for number, row in enumerate(answers):
        conversation = json.dumps(examples[number]["messages"], sort_keys=True)
        counts[conversation] += 1
        own = scores_of[number]
        scores = {name: own[name] for name in ("bert_score", "judge") if name in own}
        if own.get("win_rate") is not None:
            scores["judge"] = 100 * own["win_rate"]
        if clustered and CLUSTER in examples[number]:
            scores[CLUSTER] = examples[number][CLUSTER]
        rows[f"{counts[conversation]} {conversation}"] = row | scores
    return rows
