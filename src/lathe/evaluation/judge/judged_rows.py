"""Judged rows: prompts for the judge from generated answers, and the rows of `data/judged` from its verdicts."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.evaluation.judge.prompt import JudgePrompt, compose_prompt
from lathe.evaluation.judge.verdict import SCHEMA, Verdict
from lathe.evaluation.judge.verdict_cache import StoredVerdict

if TYPE_CHECKING:
    from lathe.config.params import Judge

logger = logging.getLogger(__name__)

SPLITS = ("validation", "test")
JUDGE_FILE = "judge.json"


@dataclass(frozen=True)
class AnswerPlace:
    """The place of an answer: a row, from 0, of `<artifact>/<split>.jsonl`.

    Of a pair, `first` says which answer the judge sees first: `own`, or the `other` that it is compared with.
    """

    artifact: str
    split: str
    row: int
    first: str | None = None

    def __str__(self) -> str:
        order = f", {self.first} answer first" if self.first else ""
        return f"{self.artifact}/{self.split} row {self.row}{order}"


@dataclass(frozen=True)
class JudgedRows:
    """The rows to judge: the verdict key of each of them, and each distinct prompt by that key.

    Of pairs, `ties` are the places of equal answers, which no judge is asked about, and `length_differences` say by how
    many characters each own answer is longer than the other.
    """

    keys: Mapping[AnswerPlace, str]
    prompts: Mapping[str, JudgePrompt]
    ties: Sequence[AnswerPlace] = ()
    length_differences: Mapping[AnswerPlace, int] = field(default_factory=dict)


class _VerdictRow(BaseModel):
    """A row of `data/judged`, as written by this run or by an earlier one."""

    model_config = ConfigDict(strict=True)

    score: int | float = Field(ge=0, le=100, allow_inf_nan=False)
    reason: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    verdict: str = Field(pattern="^[0-9a-f]{64}$")


def collect_prompts(
    generated: Path,
    artifacts: Sequence[str],
    rubric: str,
    settings: "Judge",
    identity: Mapping[str, str],
    *,
    strip_thinking: bool = True,
) -> JudgedRows:
    """Read the first `judge.max_rows` answers of each split of each artifact; equal ones share a prompt and a key.

    With `strip_thinking`, what an answer says after its thought is judged.
    """
    keys: dict[AnswerPlace, str] = {}
    prompts: dict[str, JudgePrompt] = {}
    for artifact in artifacts:
        for split in SPLITS:
            for number, row in enumerate(read_jsonl(generated / artifact / f"{split}.jsonl")[: settings.max_rows]):
                reference, answer = row["reference"], row["completion"]
                if strip_thinking:
                    reference, answer = row.get("reference_answer", reference), row.get("answer", answer)
                prompt = compose_prompt(rubric, prompt=row["prompt"], reference=reference, answer=answer)
                key = compute_verdict_key(prompt, identity, max_tokens=settings.max_tokens)
                keys[AnswerPlace(artifact, split, number)] = key
                prompts[key] = prompt
    return JudgedRows(keys, prompts)


def compute_verdict_key(prompt: JudgePrompt, identity: Mapping[str, str], *, max_tokens: int) -> str:
    """Return the SHA-256 of what determines a verdict: judge, prompt, schema, max_tokens (temperature: always 0)."""
    content = [dict(identity), prompt.system, prompt.user, max_tokens, SCHEMA]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_rubric(file: Path) -> str:
    """Return the rubric; raises InputError if the file is missing, empty, not UTF-8 or not in the checkout.

    It is sent to a server: a recipe of someone else must not name a key of the user's, nor a link to one.
    """
    if not file.resolve().is_relative_to(paths.ROOT):
        raise InputError(
            f"judge.rubric is {file}: lies outside of the checkout, and would be sent to the judge; copy it to "
            "experiments/rubrics/",
            code="outside-checkout",
        )
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"judge.rubric is {file}: no such file; name a text file that says how to score", code="missing-file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: byte {error.start} is not UTF-8; save the rubric as UTF-8", code="not-utf-8"
        ) from None
    if not text.strip():
        raise InputError(f"{file}: the rubric is empty; write down how to score", code="empty-file")
    return text


def write_verdicts(folder: Path, rows: JudgedRows, verdicts: Mapping[str, StoredVerdict]) -> None:
    """Write each row's verdict, with its key as `verdict`, to `<artifact>/<split>.jsonl`; deterministic.

    A pair has a line for each order, with `first` and `length_difference`, or one with `tie` for equal answers.
    """
    files: dict[Path, list[dict[str, Any]]] = {}
    for place, key in rows.keys.items():
        of_pair = (
            {"first": place.first, "length_difference": rows.length_differences[replace(place, first=None)]}
            if place.first
            else {}
        )
        file = folder / place.artifact / f"{place.split}.jsonl"
        files.setdefault(file, []).append({"row": place.row, **of_pair, **asdict(verdicts[key]), "verdict": key})
    for place in rows.ties:
        file = folder / place.artifact / f"{place.split}.jsonl"
        files.setdefault(file, []).append({"row": place.row, "tie": True, "reason": "the answers are equal"})
    for file, lines in files.items():
        file.parent.mkdir(exist_ok=True)
        write_jsonl(sorted(lines, key=lambda line: int(line["row"])), file)


def describe_judge(rows: JudgedRows, rubric: str, settings: "Judge", identity: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of `judge.json`: what all verdicts have in common (judge, settings, instructions)."""
    return {
        **identity,
        **({"mode": settings.mode, "against": settings.against} if settings.mode == "pairwise" else {}),
        "max_tokens": settings.max_tokens,
        "temperature": 0,
        "rubric_sha256": hashlib.sha256(rubric.encode()).hexdigest(),
        "instructions": next((prompt.system for prompt in rows.prompts.values()), ""),
    }


def count_verdicts(rows: JudgedRows, verdicts: Iterable[StoredVerdict]) -> dict[str, int]:
    """Return the metrics: rows, distinct verdicts, rows whose texts were cut, and tokens as far as reported."""
    used = list(verdicts)
    return {
        "rows": len({replace(place, first=None) for place in [*rows.keys, *rows.ties]}),
        "verdicts": len(used),
        "cut_rows": sum(rows.prompts[key].cut for key in rows.keys.values()),
        "input_tokens": sum(verdict.input_tokens or 0 for verdict in used),
        "output_tokens": sum(verdict.output_tokens or 0 for verdict in used),
    }


def read_verdicts(folder: Path) -> Iterator[tuple[str, StoredVerdict]]:
    """Yield (key, verdict) for the rows of an output of the stage judge; nothing if the folder does not exist.

    Rows in another form, such as an earlier version's, are skipped: what they judged is unknown.
    """
    skipped = 0
    for file in sorted(folder.glob("*/*.jsonl")):
        for row in read_jsonl(file):
            if row.get("tie"):
                continue
            try:
                judged = _VerdictRow.model_validate(row)
                Verdict(score=judged.score, reason=judged.reason)
            except ValidationError:
                skipped += 1
                continue
            kept = judged.model_dump(exclude={"verdict"})
            yield judged.verdict, StoredVerdict(**kept)
    if skipped:
        logger.warning("%s: %d rows are in another form and are not reused", folder, skipped)
