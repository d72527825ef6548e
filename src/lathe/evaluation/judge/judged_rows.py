"""From generated answers to questions, and from verdicts to the rows of `data/judged`."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.evaluation.judge.prompt import Question, compose
from lathe.evaluation.judge.verdict import SCHEMA, Verdict
from lathe.evaluation.judge.verdict_cache import Kept

if TYPE_CHECKING:
    from lathe.config.params import Judge

logger = logging.getLogger(__name__)

SPLITS = ("validation", "test")
FACTS = "judge.json"


@dataclass(frozen=True)
class Place:
    """A row of `<artifact>/<split>.jsonl`, counted from 0."""

    artifact: str
    split: str
    row: int

    def __str__(self) -> str:
        return f"{self.artifact}/{self.split} row {self.row}"


@dataclass(frozen=True)
class Rows:
    """What is to be judged: the key of the verdict of each row, and each question once by that key."""

    keys: Mapping[Place, str]
    questions: Mapping[str, Question]


class _Judged(BaseModel):
    """A row of `data/judged`, as another run may have left it."""

    model_config = ConfigDict(strict=True)

    score: int | float = Field(ge=0, le=100, allow_inf_nan=False)
    reason: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    verdict: str = Field(pattern="^[0-9a-f]{64}$")


def collect(
    generated: Path, artifacts: Sequence[str], rubric: str, settings: "Judge", identity: Mapping[str, str]
) -> Rows:
    """Read the first `judge.max_rows` answers of each split of each artifact, and put equal ones to the judge once."""
    keys: dict[Place, str] = {}
    questions: dict[str, Question] = {}
    for artifact in artifacts:
        for split in SPLITS:
            for number, row in enumerate(read_jsonl(generated / artifact / f"{split}.jsonl")[: settings.max_rows]):
                question = compose(rubric, request=row["prompt"], reference=row["reference"], answer=row["completion"])
                key = key_of(question, identity, max_tokens=settings.max_tokens)
                keys[Place(artifact, split, number)] = key
                questions[key] = question
    return Rows(keys, questions)


def key_of(question: Question, identity: Mapping[str, str], *, max_tokens: int) -> str:
    """Return the SHA-256 of all that decides a verdict: who is asked, what, and how. The temperature is always 0."""
    decides = [dict(identity), question.system, question.user, max_tokens, SCHEMA]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def read_rubric(file: Path) -> str:
    """Return the rubric; raises InputError where there is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"judge.rubric is {file}: no such file; name a text file that says how to mark") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8; save the rubric as UTF-8") from None
    if not text.strip():
        raise InputError(f"{file}: the rubric is empty; write down how to mark")
    return text


def write(folder: Path, rows: Rows, verdicts: Mapping[str, Kept]) -> None:
    """Write each row's verdict to `<artifact>/<split>.jsonl`, its key as `verdict`; equal bytes for equal input."""
    files: dict[Path, list[dict[str, Any]]] = {}
    for place, key in rows.keys.items():
        file = folder / place.artifact / f"{place.split}.jsonl"
        files.setdefault(file, []).append({"row": place.row, **asdict(verdicts[key]), "verdict": key})
    for file, lines in files.items():
        file.parent.mkdir(exist_ok=True)
        write_jsonl(lines, file)


def facts(rows: Rows, rubric: str, settings: "Judge", identity: Mapping[str, str]) -> dict[str, Any]:
    """Return who judged and by what: what `judge.json` beside the verdicts says of all of them."""
    return {
        **identity,
        "max_tokens": settings.max_tokens,
        "temperature": 0,
        "rubric_sha256": hashlib.sha256(rubric.encode()).hexdigest(),
        "instructions": next((question.system for question in rows.questions.values()), ""),
    }


def counts(rows: Rows, verdicts: Iterable[Kept]) -> dict[str, int]:
    """Return how many rows were judged by how many different verdicts, of how many tokens where the server told."""
    used = list(verdicts)
    return {
        "rows": len(rows.keys),
        "verdicts": len(used),
        "cut_rows": sum(rows.questions[key].cut for key in rows.keys.values()),
        "input_tokens": sum(kept.input_tokens or 0 for kept in used),
        "output_tokens": sum(kept.output_tokens or 0 for kept in used),
    }


def verdicts_in(folder: Path) -> Iterator[tuple[str, Kept]]:
    """Yield the verdicts of an output of this stage by their keys; none where there is no such folder.

    Rows of another form, such as an older one's, are passed over: they cannot be told from what they judged.
    """
    passed_over = 0
    for file in sorted(folder.glob("*/*.jsonl")):
        for row in read_jsonl(file):
            try:
                judged = _Judged.model_validate(row)
                Verdict(score=judged.score, reason=judged.reason)
            except ValidationError:
                passed_over += 1
                continue
            kept = judged.model_dump(exclude={"verdict"})
            yield judged.verdict, Kept(**kept)
    if passed_over:
        logger.warning("%s: %d rows are of another form and are not used again", folder, passed_over)
