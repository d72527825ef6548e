"""Held-out rows put to a GGUF: its answers, the likelihood of the references, and how often it stops."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths, scratch
from lathe.common.code_closure import code_closure
from lathe.common.jsonl import iterate_jsonl, write_jsonl
from lathe.inference import general_text, likelihood
from lathe.inference.generate import Completion, Generator
from lathe.inference.journal import Journal
from lathe.inference.row_file import RowFile
from lathe.models.answer_reading import HeldOutPrompt, read_answer, render_prompt
from lathe.models.answer_split import find_answer_prefix

if TYPE_CHECKING:
    from lathe.inference.answer_engines import AnswerEngine

# A row of data/processed: `messages`, and `tools` if there are any.
Example = Mapping[str, Any]

# Packages that determine an answer, besides data and parameters.
PACKAGES = ("llama-cpp-python", "numpy", "transformers", "Jinja2")


@dataclass
class HeldOutRun:
    """A GGUF that is measured on held-out rows, and the journal of its finished rows.

    `engine` answers in place of the GGUF, whose likelihoods are measured all the same; None: the GGUF itself answers.
    `against` is the model that the KL divergence of this one is measured from. `tokens` and `seconds` say how much this
    process generated, and how long that took, prompts and references included; rows that were in the journal before are
    not counted.
    """

    generator: Generator
    journal: Journal
    against: Generator | None = None
    engine: "AnswerEngine | None" = None
    tokens: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def store_prompts(self, name: str, rows: Iterable[Example]) -> RowFile:
        """Render each row of a split once, and return the prompts, which the journal stores."""
        template = self.generator.chat_template
        return self.journal.store_rows(
            name, (render_prompt(template, row["messages"], row.get("tools")) for row in rows)
        )

    def measure_split(self, name: str, prompts: RowFile, out: Path, *, max_new_tokens: int) -> dict[str, Any]:
        """Let the model answer each prompt of a split, greedily, and compare with the references.

        A document is not answered: all of it is scored. Writes to `out`, in the order of `prompts`: {prompt, reference,
        completion, finish_reason, tokens, nll, reference_tokens, kl}, and what `read_answer` returns. Returns the
        split's perplexity of the references, mean KL divergence per token of them (None without `against`), stop rate
        and number of rows.
        """
        answers, references = f"{name}/answers", f"{name}/references"
        began = time.perf_counter()
        self._score_documents(prompts, references)
        asked = [number for number, row in enumerate(_read_prompts(prompts)) if not row.is_document]
        answered, scored = self.journal.list_finished(answers), self.journal.list_finished(references)

        def read_pairs() -> Iterator[tuple[str, str]]:
            return ((row.prompt, row.answer) for row in _read_prompts(prompts) if not row.is_document)

        is_scored = {index for index, number in enumerate(asked) if number in scored}
        results: Iterator[tuple[int, Completion | likelihood.Likelihood]]
        if self.engine is None:
            results = likelihood.answer_and_score(
                self.generator,
                read_pairs,
                max_new_tokens=max_new_tokens,
                against=self.against,
                answered={index for index, number in enumerate(asked) if number in answered},
                scored=is_scored,
            )
        else:
            self.engine.answer(
                self.generator,
                lambda: ((number, prompt) for number, (prompt, _) in zip(asked, read_pairs(), strict=True)),
                max_new_tokens=max_new_tokens,
                finished=answered,
                keep=lambda number, completion: self.journal.add(answers, number, vars(completion)),
            )
            results = iter(
                likelihood.score_references(self.generator, read_pairs, against=self.against, finished=is_scored)
            )
        for index, result in results if asked else ():
            number = asked[index]
            if isinstance(result, Completion):
                self.tokens += result.tokens
            self.journal.add(answers if isinstance(result, Completion) else references, number, vars(result))
        self.seconds += time.perf_counter() - began
        totals = _SplitTotals()
        write_jsonl(map(totals.add, self._join_rows(prompts, answers, references)), out)
        return totals.summarize()

    def measure_general_text(self, file: Path, out: Path) -> float:
        """Write {text, nll, tokens} of each paragraph of a text file; return the perplexity of them all."""
        paragraphs = general_text.read_paragraphs(file)
        for number, likely in likelihood.score_texts(
            self.generator, lambda: paragraphs, finished=self.journal.list_finished("general")
        ):
            self.journal.add("general", number, vars(likely))
        rows = [self.journal.read_row("general", number) for number in range(len(paragraphs))]
        write_jsonl(
            (
                {"text": text, "nll": _round_nats(row["nll"]), "tokens": row["tokens"]}
                for text, row in zip(paragraphs, rows, strict=True)
            ),
            out,
        )
        return _compute_perplexity(math.fsum(row["nll"] for row in rows), sum(row["tokens"] for row in rows))

    def _score_documents(self, prompts: RowFile, references: str) -> None:
        finished = self.journal.list_finished(references)
        numbers = [number for number, row in enumerate(_read_prompts(prompts)) if row.is_document]
        results = likelihood.score_texts(
            self.generator,
            lambda: (row.reference for row in _read_prompts(prompts) if row.is_document),
            against=self.against,
            finished={index for index, number in enumerate(numbers) if number in finished},
            task="documents",
        )
        for index, likely in results if numbers else ():
            self.journal.add(references, numbers[index], vars(likely))

    def _join_rows(self, prompts: RowFile, answers: str, references: str) -> Iterator[dict[str, Any]]:
        template = self.generator.chat_template
        mark = {"engine": self.engine.mark} if self.engine else {}  # without: llama.cpp, in process
        for number, row in enumerate(_read_prompts(prompts)):
            likely = self.journal.read_row(references, number)
            completion = _NO_ANSWER if row.is_document else self.journal.read_row(answers, number)
            yield {
                "prompt": row.prompt,
                "reference": row.reference,
                "completion": completion["text"].removeprefix(find_answer_prefix(template)),
                "finish_reason": completion["finish_reason"],
                "tokens": completion["tokens"],
                "nll": likely["nll"],
                "reference_tokens": likely["tokens"],
                "kl": likely["kl"],
                **({} if row.is_document else read_answer(template, row, completion["text"]) | mark),
            }


_NO_ANSWER: dict[str, Any] = {"text": "", "finish_reason": None, "tokens": 0}


def _read_prompts(prompts: RowFile) -> Iterator[HeldOutPrompt]:
    return (HeldOutPrompt(*row) for row in prompts)


@dataclass
class _SplitTotals:
    rows: int = 0
    answers: int = 0
    stopped: int = 0
    tokens: int = 0
    nll: float = 0.0
    kl: float | None = None

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Count a row in; return it with its numbers rounded."""
        self.rows += 1
        self.answers += row["finish_reason"] is not None
        self.stopped += row["finish_reason"] == "stop"
        self.tokens += row["reference_tokens"]
        self.nll += row["nll"]
        if row["kl"] is not None:
            self.kl = (self.kl or 0.0) + row["kl"] * row["reference_tokens"]
        return {**row, "nll": _round_nats(row["nll"]), "kl": _round_significant(row["kl"])}

    def summarize(self) -> dict[str, Any]:
        return {
            "perplexity": _compute_perplexity(self.nll, self.tokens),
            "kl": None if self.kl is None else _round_significant(self.kl / self.tokens),
            "stop_rate": round(self.stopped / self.answers, 4) if self.answers else None,
            "rows": self.rows,
        }


def iterate_rows(file: Path, *, max_rows: int | None) -> Iterator[Example]:
    """Yield the rows of a processed split, the first `max_rows` of them."""
    for number, row in enumerate(iterate_jsonl(file)):
        if number == max_rows:
            return
        yield row


def compute_fingerprint(files: Mapping[str, Path], determines: Mapping[str, Any]) -> str:
    """Return the name of a run on these files: a digest of their contents, of what else determines it, and of the code.

    The paths of the files make no difference. Raises InputError if one is missing.
    """
    return scratch.compute_fingerprint(determines, files=files, packages=PACKAGES, code=list_code())


def list_code() -> list[Path]:
    """Return the files of the library that determine an answer: what the stage `generate` depends on."""
    return code_closure(paths.ROOT / "stages/generate.py")


def _compute_perplexity(nll: float, tokens: int) -> float:
    return round(math.exp(nll / tokens), 4)


def _round_nats(nll: float) -> float:
    return round(nll, 6)


def _round_significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
