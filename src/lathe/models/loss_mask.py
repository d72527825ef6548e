"""Loss mask: a conversation as token ids, and which of them are supervised."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from lathe.models.chat_template import Conversation, TemplateError, prompt_and_answer
from lathe.models.special_tokens import control_tokens
from lathe.models.token_segments import _common_length, _concatenated, _ids, _segment_starts, _segments

# The tokenizer spreads a batch over the cores; the ids of a larger one no longer lie in the caches of the processor.
ROWS_PER_BATCH = 128


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sequence.

    `input_ids` and `supervised` have one entry per token; `row` is the index of the conversation it came from.
    """

    row: int
    input_ids: list[int]
    supervised: list[bool]


def encode(
    tokenizer: Any, conversations: Sequence[Conversation], *, supervise: Literal["all", "last"]
) -> list[Encoded]:
    """Tokenise conversations for training; raises TemplateError that names the first row that cannot be encoded.

    `tokenizer` is a fast Hugging Face tokenizer with a chat template; `supervise` says which assistant turns are
    learnt. The method, for each of these turns:

    1. The prompt is `render(messages before the turn, add_generation_prompt=True)`, tokenised alone: exactly the ids
       that inference starts from, whatever would have merged across its end.
    2. What is supervised is what the template writes after that prompt when the turn is the last one, up to and
       including the first special token behind the answer (`<|im_end|>`, `<|eot_id|>`, `</s>`): what the model has to
       say, and to stop. The white space behind is not part of it. Where the template marks no end, the tokenizer's EOS
       is appended, or an answer would never stop.
    3. The answer's ids are those it has behind its prompt in one text, so that SentencePiece adds no space of its own;
       where the tokenizer would merge its first characters with the prompt's last ones, those it has behind EOS.
    4. Turns share one sequence as long as the ids so far begin the next turn's prompt. Where they do not (a template
       that drops earlier reasoning, one without an end mark), the next turn begins a sequence of its own: every turn is
       learnt once, behind the ids that inference would have.

    A template may write more than the answer after its generation prompt: Qwen3's writes an empty `<think>` block
    into the last turn. It is supervised, because the model has to say it in order to go on; see `answer_lead`.

    A sequence begins with exactly one BOS if the template writes one or the tokenizer adds one to plain text.
    """
    sequences: list[Encoded] = []
    for row, result in enumerate(encode_each(tokenizer, conversations, supervise=supervise)):
        if isinstance(result, TemplateError):
            raise TemplateError(f"row {row + 1}: {result}")
        sequences += result
    return sequences


def encode_each(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    supervise: Literal["all", "last"],
    format_: "Format | None" = None,
) -> Iterator[list[Encoded] | TemplateError]:
    """Yield, conversation by conversation, the sequences that `encode` makes of it or the error that prevents it.

    Who calls often with few conversations gives the tokenizer's `Format.of`, which takes a while to find.
    """
    format_ = format_ or Format.of(tokenizer)
    for start in range(0, len(conversations), ROWS_PER_BATCH):
        turns = [_turns(format_, messages, supervise) for messages in conversations[start : start + ROWS_PER_BATCH]]
        flat = [turn for row in turns if not isinstance(row, TemplateError) for turn in row]
        ids = iter(_tokenize_turns(tokenizer, format_, flat))
        for row, result in enumerate(turns, start):
            yield result if isinstance(result, TemplateError) else _join(row, [next(ids) for _ in result])


@dataclass(frozen=True, slots=True)
class Format:
    """What of a tokenizer decides how a conversation is written."""

    chat_template: str
    bos_token: str
    eos_token: str
    control_tokens: re.Pattern[str]
    segment_starts: re.Pattern[str]
    added_bos: int | None  # the id that the tokenizer puts before plain text

    @classmethod
    def of(cls, tokenizer: Any) -> "Format":
        """Return how the tokenizer writes; raises TemplateError where it cannot write conversations."""
        if not tokenizer.chat_template:
            raise TemplateError("the tokenizer has no chat template; choose an instruction-tuned model")
        if not tokenizer.eos_token:
            raise TemplateError(
                "the tokenizer has no eos_token, so no answer could end; set it in tokenizer_config.json"
            )
        bos = tokenizer.bos_token_id
        return cls(
            chat_template=tokenizer.chat_template,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token,
            control_tokens=control_tokens(tokenizer),
            segment_starts=_segment_starts(tokenizer),
            added_bos=bos if bos is not None and tokenizer("text")["input_ids"][0] == bos else None,
        )


@dataclass(frozen=True, slots=True)
class _Turn:
    prompt: str
    answer: str  # with its end token


def _turns(format_: Format, messages: Conversation, supervise: str) -> list[_Turn] | TemplateError:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return TemplateError("no supervised token: there is no assistant message; add the answer")
    try:
        return [_turn(format_, messages[: index + 1]) for index in (answers if supervise == "all" else answers[-1:])]
    except TemplateError as error:
        return error


def _turn(format_: Format, messages: Conversation) -> _Turn:
    prompt, answer, rest = prompt_and_answer(
        format_.chat_template, messages, bos_token=format_.bos_token, eos_token=format_.eos_token
    )
    end = format_.control_tokens.search(rest)
    return _Turn(prompt, answer + (rest[: end.end()] if end else rest.rstrip() + format_.eos_token))


def _tokenize_turns(tokenizer: Any, format_: Format, turns: list[_Turn]) -> list[tuple[list[int], int]]:
    """Return the ids of each turn, prompt and answer, and how many of them are the prompt's."""
    prompts = [_segments(format_.segment_starts, turn.prompt) for turn in turns]
    wholes = [_segments(format_.segment_starts, turn.prompt + turn.answer) for turn in turns]
    ids = _ids(tokenizer, chain.from_iterable(chain(prompts, wholes)))
    tokenized: list[tuple[list[int], int]] = []
    merged: dict[
        int, list[int]
    ] = {}  # the prompts of turns whose answer begins with characters of its prompt's last id
    for index, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        whole_ids = _concatenated([ids[segment] for segment in whole])
        start = _common_length(prompt, whole, ids)
        if start is None:
            merged[index] = _concatenated([ids[segment] for segment in prompt])
        tokenized.append((whole_ids, start or 0))
    behind_eos = [_segments(format_.segment_starts, format_.eos_token + turns[index].answer) for index in merged]
    ids = _ids(tokenizer, chain.from_iterable(behind_eos))
    for (index, prompt_ids), segments in zip(merged.items(), behind_eos, strict=True):
        answer_ids = _concatenated([ids[segment] for segment in segments])[1:]
        tokenized[index] = prompt_ids + answer_ids, len(prompt_ids)
    if format_.added_bos is not None:
        bos = [format_.added_bos]
        tokenized = [
            (each, start) if each[:1] == bos and start else (bos + each, start + 1) for each, start in tokenized
        ]
    return tokenized


def _join(row: int, turns: list[tuple[list[int], int]]) -> list[Encoded]:
    sequences: list[Encoded] = []
    for ids, start in turns:
        known = len(sequences[-1].input_ids) if sequences else 0
        if not known or known > start or ids[:known] != sequences[-1].input_ids:
            sequences.append(Encoded(row, ids, [False] * start + [True] * (len(ids) - start)))
        else:
            sequences[-1].input_ids.extend(ids[known:])
            sequences[-1].supervised.extend([False] * (start - known) + [True] * (len(ids) - start))
    return sequences
