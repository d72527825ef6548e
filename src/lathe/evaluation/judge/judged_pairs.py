"""Judged pairs: each answer against another one to the same row, asked for in both orders.

The other answer is that of an artifact of this run (`base`, `merged`, a quantization type), or of the same artifact in
another experiment, whose answers are read from DVC's cache. Two equal answers are a tie, for which no judge is asked.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.dvc_api import open_repository
from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl
from lathe.evaluation.judge.judged_rows import SPLITS, AnswerPlace, JudgedRows, compute_verdict_key
from lathe.evaluation.judge.pair_prompt import compose_pair_prompt
from lathe.evaluation.judge.prompt import JudgePrompt
from lathe.evaluation.mixed_engines import check_engines, find_engines
from lathe.provenance.revisions import Revision, find_revision

if TYPE_CHECKING:
    from lathe.config.params import Judge

logger = logging.getLogger(__name__)

ORDERS = ("own", "other")  # which answer the judge sees first: the artifact's own, or the one it is compared with

AnswerRows = list[dict[str, Any]]


@dataclass(frozen=True)
class OtherAnswers:
    """The answers to compare with: `rows[artifact, split]`, and the experiment's commit, if they are of one."""

    rows: Mapping[tuple[str, str], AnswerRows]
    commit: str | None


def find_other_revision(artifacts: Sequence[str], against: str) -> Revision | None:
    """Return the experiment that `judge.against` names; None if it names an artifact of this run.

    Raises InputError if it names neither.
    """
    if against in artifacts:
        return None
    try:
        return find_revision(against)
    except InputError as error:
        raise InputError(
            f"judge.against: {error}; or name an artifact of this run: {', '.join(artifacts)}", code=error.code
        ) from None


def read_other_answers(generated: Path, artifacts: Sequence[str], against: str) -> OtherAnswers:
    """Read the answers that those of each artifact are compared with, by `judge.against`.

    Raises InputError if it names neither an artifact nor an experiment, or one without answers in DVC's cache.
    """
    revision = find_other_revision(artifacts, against)
    if revision is None:
        of_split = {split: read_jsonl(generated / against / f"{split}.jsonl") for split in SPLITS}
        return OtherAnswers({(artifact, split): of_split[split] for artifact in artifacts for split in SPLITS}, None)
    rows = {}
    with open_repository(paths.ROOT) as repo:
        for artifact in artifacts:
            for split in SPLITS:
                file = revision.find_cached_file(repo, f"data/generated/{artifact}", f"{split}.jsonl")
                if file is not None:
                    rows[artifact, split] = read_jsonl(file)
    if not rows:
        raise InputError(
            f"judge.against is {against!r}: its answers are not in DVC's cache; `dvc exp pull` or `dvc fetch` brings "
            "them",
            code="answers-not-cached",
        )
    return OtherAnswers(rows, revision.commit)


def collect_pairs(
    generated: Path,
    artifacts: Sequence[str],
    rubric: str,
    settings: "Judge",
    identity: Mapping[str, str],
    others: OtherAnswers,
    *,
    strip_thinking: bool = True,
    allow_mixed_engines: bool = False,
) -> JudgedRows:
    """Pair the first `judge.max_rows` answers of each split with the others' to the same rows, in both orders.

    Rows of an experiment are those with the same prompt and reference. Raises InputError if none is, and if the answers
    are of different engines, unless that is allowed; rows without an answer of the other side are logged, and have no
    verdict.
    """
    own = {
        (artifact, split): read_jsonl(generated / artifact / f"{split}.jsonl")
        for artifact in artifacts
        for split in SPLITS
    }
    for split in SPLITS:
        sides = {artifact: own[artifact, split] for artifact in artifacts}
        if others.commit:
            theirs = {artifact: rows for (artifact, of), rows in others.rows.items() if of == split}
            sides |= {f"{artifact} of {settings.against}": rows for artifact, rows in theirs.items()}
        if warning := check_engines(find_engines(sides), allowed=allow_mixed_engines):
            logger.warning("%s", warning)
    keys: dict[AnswerPlace, str] = {}
    prompts: dict[str, JudgePrompt] = {}
    ties: list[AnswerPlace] = []
    differences: dict[AnswerPlace, int] = {}
    for artifact in artifacts:
        for split in SPLITS:
            rows = own[artifact, split][: settings.max_rows]
            found = _match_rows(rows, others.rows.get((artifact, split), []))
            if rows and len(found) < len(rows):
                logger.warning(
                    "%s/%s: %d of %d rows have no answer of %s to compare with, and get no verdict",
                    artifact,
                    split,
                    len(rows) - len(found),
                    len(rows),
                    settings.against,
                )
            for number, other in found.items():
                row = rows[number]
                own_text, reference = _get_texts(row, strip_thinking=strip_thinking)
                other_text, _ = _get_texts(other, strip_thinking=strip_thinking)
                place = AnswerPlace(artifact, split, number)
                differences[place] = len(own_text) - len(other_text)
                if own_text == other_text:
                    ties.append(place)
                    continue
                for order in ORDERS:
                    first, second = (own_text, other_text) if order == "own" else (other_text, own_text)
                    prompt = compose_pair_prompt(
                        rubric, prompt=row["prompt"], reference=reference, first=first, second=second
                    )
                    key = compute_verdict_key(prompt, identity, max_tokens=settings.max_tokens)
                    keys[AnswerPlace(artifact, split, number, order)] = key
                    prompts[key] = prompt
    if not differences:
        raise InputError(
            f"judge.against is {settings.against!r}: it answered none of these rows; name an experiment with the same "
            "data, or an artifact of this run",
            code="no-common-rows",
        )
    return JudgedRows(keys, prompts, ties, differences)


def _match_rows(rows: AnswerRows, others: AnswerRows) -> dict[int, dict[str, Any]]:
    """Return the other side's row for each row number; rows that occur several times are matched in their order."""
    known = dict(_number_rows(others))
    return {index: known[name] for index, (name, _) in enumerate(_number_rows(rows)) if name in known}


def _number_rows(rows: AnswerRows) -> Iterator[tuple[tuple[str, str, int], dict[str, Any]]]:
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        content = (row["prompt"], row["reference"])
        counts[content] += 1
        yield (*content, counts[content]), row


def _get_texts(row: Mapping[str, Any], *, strip_thinking: bool) -> tuple[str, str]:
    """Return answer and reference, without a thought if that is stripped."""
    answer, reference = str(row["completion"]), str(row["reference"])
    if strip_thinking:
        answer, reference = str(row.get("answer", answer)), str(row.get("reference_answer", reference))
    return answer, reference
