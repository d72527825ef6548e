"""Held-out conversations put to a GGUF: what it answers, how likely it finds the reference, whether it stops."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lathe.common import paths, scratch
from lathe.common.code_closure import code_closure
from lathe.common.jsonl import iterate_jsonl, write_jsonl
from lathe.inference import general_text, likelihood
from lathe.inference.generate import Generator
from lathe.inference.journal import Journal
from lathe.models.chat_template import Conversation, answer_lead, prompt_and_answer

# What besides data and parameters decides an answer.
PACKAGES = ("llama-cpp-python", "numpy", "transformers", "Jinja2")


@dataclass
class Asking:
    """A GGUF that is asked, and where its finished rows are kept.

    `against` is the model that the divergence of this one is measured from. `tokens` and `seconds` say how much was
    generated here, and how long that took; rows from the journal are not among them.
    """

    generator: Generator
    journal: Journal
    against: Generator | None = None
    tokens: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def split(
        self, conversations: Callable[[], Iterable[Conversation]], out: Path, *, name: str, max_new_tokens: int
    ) -> dict[str, Any]:
        """Let the model write the last turn of each conversation, greedily, and compare with what stands there.

        Writes to `out`, in the order of `conversations`, which is called several times and read lazily:
        {prompt, reference, completion, finish_reason, tokens, nll, reference_tokens, kl}. Returns the split's
        perplexity of the references, mean divergence per token of theirs (None without `against`), stop rate and number
        of rows.
        """
        answered, weighed = f"{name}/answers", f"{name}/references"
        began = time.perf_counter()
        for number, completion in self.generator.completions(
            lambda: (each.prompt for each in self._asked(conversations)),
            max_new_tokens=max_new_tokens,
            done=self.journal.done(answered),
        ):
            self.tokens += completion.tokens
            self.journal.add(answered, number, vars(completion))
        self.seconds += time.perf_counter() - began
        for number, likely in likelihood.of_references(
            self.generator,
            lambda: ((each.prompt, each.written) for each in self._asked(conversations)),
            against=self.against,
            done=self.journal.done(weighed),
        ):
            self.journal.add(weighed, number, vars(likely))
        totals = _Totals()
        write_jsonl(map(totals.add, self._rows(conversations, answered, weighed)), out)
        return totals.facts()

    def general(self, file: Path, out: Path) -> float:
        """Write {text, nll, tokens} of each paragraph of a text file; return the perplexity of them all."""
        paragraphs = general_text.paragraphs(file)
        for number, likely in likelihood.of_texts(
            self.generator, lambda: paragraphs, done=self.journal.done("general")
        ):
            self.journal.add("general", number, vars(likely))
        rows = [self.journal.row("general", number) for number in range(len(paragraphs))]
        write_jsonl(
            (
                {"text": text, "nll": _nats(row["nll"]), "tokens": row["tokens"]}
                for text, row in zip(paragraphs, rows, strict=True)
            ),
            out,
        )
        return _perplexity(math.fsum(row["nll"] for row in rows), sum(row["tokens"] for row in rows))

    def _asked(self, conversations: Callable[[], Iterable[Conversation]]) -> Iterator["_Asked"]:
        tokens = {"bos_token": self.generator.bos_token, "eos_token": self.generator.eos_token}
        template = self.generator.template
        lead = answer_lead(template, **tokens)
        for conversation in conversations():
            prompt, written, _ = prompt_and_answer(template, conversation, **tokens)
            last = conversation[-1]
            reference = written.removeprefix(lead) if last.get("tool_calls") else str(last["content"])
            yield _Asked(prompt, written, reference, lead)

    def _rows(
        self, conversations: Callable[[], Iterable[Conversation]], answered: str, weighed: str
    ) -> Iterator[dict[str, Any]]:
        for number, asked in enumerate(self._asked(conversations)):
            completion, likely = self.journal.row(answered, number), self.journal.row(weighed, number)
            yield {
                "prompt": asked.prompt,
                "reference": asked.reference,
                "completion": completion["text"].removeprefix(asked.lead),
                "finish_reason": completion["finish_reason"],
                "tokens": completion["tokens"],
                "nll": likely["nll"],
                "reference_tokens": likely["tokens"],
                "kl": likely["kl"],
            }


@dataclass(frozen=True, slots=True)
class _Asked:
    prompt: str
    written: str  # the reference as the template writes it
    reference: str
    lead: str  # what the template writes before every answer, and is none of it


@dataclass
class _Totals:
    rows: int = 0
    stopped: int = 0
    tokens: int = 0
    nll: float = 0.0
    kl: float | None = None

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Count a row in; return it with as many digits as are to be kept."""
        self.rows += 1
        self.stopped += row["finish_reason"] == "stop"
        self.tokens += row["reference_tokens"]
        self.nll += row["nll"]
        if row["kl"] is not None:
            self.kl = (self.kl or 0.0) + row["kl"] * row["reference_tokens"]
        return {**row, "nll": _nats(row["nll"]), "kl": _significant(row["kl"])}

    def facts(self) -> dict[str, Any]:
        return {
            "perplexity": _perplexity(self.nll, self.tokens),
            "kl": None if self.kl is None else _significant(self.kl / self.tokens),
            "stop_rate": round(self.stopped / self.rows, 4),
            "rows": self.rows,
        }


def conversations_in(file: Path, *, max_rows: int | None) -> Iterator[Conversation]:
    """Yield the conversations of a processed split, the first `max_rows` of them."""
    for number, row in enumerate(iterate_jsonl(file)):
        if number == max_rows:
            return
        yield row["messages"]


def fingerprint(files: Mapping[str, Path], decides: Mapping[str, Any]) -> str:
    """Return the name of the work on these files: a digest of what is in them, of what else decides, and of the code.

    Where the files lie makes no difference. Raises InputError where one is missing.
    """
    return scratch.compute_fingerprint(decides, files=files, packages=PACKAGES, code=code())


def code() -> list[Path]:
    """Return the files of the library that decide an answer: what the stage `generate` depends on."""
    return code_closure(paths.ROOT / "stages/generate.py")


def _perplexity(nll: float, tokens: int) -> float:
    return round(math.exp(nll / tokens), 4)


def _nats(nll: float) -> float:
    return round(nll, 6)


def _significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
