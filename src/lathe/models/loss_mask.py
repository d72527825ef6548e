"""Loss mask: a conversation as token ids, and which of them are supervised."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Self

from lathe.models.answer_split import split_answer
from lathe.models.chat_template import ChatTemplate, Conversation, Tools
from lathe.models.document import is_document
from lathe.models.special_tokens import compile_control_tokens
from lathe.models.template_error import TemplateError
from lathe.models.token_segments import (
    compile_segment_starts,
    concatenate,
    count_prompt_ids,
    split_segments,
    tokenize_segments,
)
from lathe.models.tokenizer_template import read_chat_template

# The tokenizer spreads a batch over the cores; the ids of a larger one no longer fit into the caches of the processor.
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
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    supervise: Literal["all", "last"],
    tools: Sequence[Tools | None] | None = None,
) -> list[Encoded]:
    """Tokenize conversations for training; raises TemplateError that names the first row that cannot be encoded.

    `tokenizer` is a fast Hugging Face tokenizer with a chat template; `supervise` says which assistant turns are
    supervised; `tools` are the definitions of tools of each conversation. The method, for each of these turns:

    1. The prompt is `render(messages before the turn, add_generation_prompt=True)`, tokenized alone: exactly the ids
       that inference starts from, whatever would have merged across its end.
    2. Supervised is what the template writes after that prompt when the turn is the last one, up to and including the
       first special token after the answer (`<|im_end|>`, `<|eot_id|>`, `</s>`), so that the model learns to stop; or
       up to the EOS, if special tokens alone stand before it. The white space after it is not supervised. If the
       template marks no end, the tokenizer's EOS is appended.
    3. The answer's ids are those it has after its prompt in one text, so that SentencePiece adds no space of its own;
       if the tokenizer would merge its first characters with the prompt's last ones, those it has after EOS.
    4. Turns share one sequence as long as the ids so far begin the next turn's prompt. If they do not (a template
       that drops earlier reasoning, one without an end mark), the next turn begins a sequence of its own: every turn is
       supervised once, after the ids that inference would have.

    A template may write more than the answer after its generation prompt: Qwen3's writes an empty `<think>` block
    into the last turn. It is supervised, because the model has to write it; see `find_answer_prefix`.

    All of a document is supervised, with the EOS that is put after it.

    A sequence begins with exactly one BOS if the template writes one or the tokenizer adds one to plain text.
    """
    sequences: list[Encoded] = []
    encoder = ConversationEncoder.of_tokenizer(tokenizer)
    for row, result in enumerate(encoder.encode_rows(conversations, supervise=supervise, tools=tools)):
        if isinstance(result, TemplateError):
            raise TemplateError(f"row {row + 1}: {result}", code=result.code)
        sequences += result
    return sequences


@dataclass(frozen=True, slots=True)
class ConversationEncoder:
    """A tokenizer with what of it decides how conversations become token ids; made once, used for many batches."""

    tokenizer: Any
    template: ChatTemplate
    control_tokens: re.Pattern[str]
    segment_starts: re.Pattern[str]
    added_bos: int | None  # the id that the tokenizer puts before plain text

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Self:
        """Return the encoder of a tokenizer. Raises TemplateError if it has no chat template or no end token."""
        template = read_chat_template(tokenizer)
        if not template.eos_token:
            raise TemplateError(
                "the tokenizer has no eos_token, so no answer could end; set it in tokenizer_config.json",
                code="no-end-token",
            )
        return cls(
            tokenizer=tokenizer,
            template=template,
            control_tokens=compile_control_tokens(tokenizer),
            segment_starts=compile_segment_starts(tokenizer),
            added_bos=tokenizer.bos_token_id if template.adds_bos else None,
        )

    def encode_rows(
        self,
        conversations: Sequence[Conversation],
        *,
        supervise: Literal["all", "last"],
        tools: Sequence[Tools | None] | None = None,
    ) -> Iterator[list[Encoded] | TemplateError]:
        """Yield for each conversation the sequences that `encode` makes of it, or the error that prevents it."""
        tools = tools or [None] * len(conversations)
        for start in range(0, len(conversations), ROWS_PER_BATCH):
            stop = start + ROWS_PER_BATCH
            batch = zip(conversations[start:stop], tools[start:stop], strict=True)
            rows = [self._render_turns(messages, supervise, of_row) for messages, of_row in batch]
            turns = [turn for row in rows if not isinstance(row, TemplateError) for turn in row]
            ids = iter(self._tokenize_turns(turns))
            for row, result in enumerate(rows, start):
                yield result if isinstance(result, TemplateError) else _join_turns(row, [next(ids) for _ in result])

    def _render_turns(
        self, messages: Conversation, supervise: str, tools: Tools | None
    ) -> "list[_Turn] | TemplateError":
        if is_document(messages):
            return [_Turn("", self.template.render(messages) + self.template.eos_token)]
        answers = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("train", True)
        ]
        if not answers:
            return TemplateError(
                "no supervised token: there is no assistant message; add the answer",
                code="no-supervised-token",
            )
        messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        try:
            chosen = answers if supervise == "all" else answers[-1:]
            return [self._render_turn(messages[: at + 1], tools) for at in chosen]
        except TemplateError as error:
            return error

    def _render_turn(self, messages: Conversation, tools: Tools | None) -> "_Turn":
        prompt, answer, rest = split_answer(self.template, messages, tools)
        return _Turn(prompt, answer + self._find_end(rest))

    def _find_end(self, rest: str) -> str:
        """Return what ends a turn, of the text that the template writes after the answer."""
        first = end = self.control_tokens.search(rest)
        if not first:
            return rest.rstrip() + self.template.eos_token
        # Command R7B writes another marker before its end token.
        while end and end[0] != self.template.eos_token:
            end = self.control_tokens.match(rest, end.end())
        return rest[: (end or first).end()]

    def _tokenize_turns(self, turns: "list[_Turn]") -> list[tuple[list[int], int]]:
        """Return the ids of each turn, prompt and answer, and how many of them are the prompt's."""
        starts = self.segment_starts
        prompts = [split_segments(starts, turn.prompt) for turn in turns]
        texts = [split_segments(starts, turn.prompt + turn.answer) for turn in turns]
        ids = tokenize_segments(self.tokenizer, chain.from_iterable(chain(prompts, texts)))
        tokenized: list[tuple[list[int], int]] = []
        # The prompts of turns whose answer begins with characters of its prompt's last id.
        merged: dict[int, list[int]] = {}
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            prompt_ids = count_prompt_ids(prompt, text, ids)
            if prompt_ids is None:
                merged[index] = concatenate([ids[segment] for segment in prompt])
            tokenized.append((concatenate([ids[segment] for segment in text]), prompt_ids or 0))
        after_eos = [split_segments(starts, self.template.eos_token + turns[index].answer) for index in merged]
        ids = tokenize_segments(self.tokenizer, chain.from_iterable(after_eos))
        for (index, before), segments in zip(merged.items(), after_eos, strict=True):
            answer_ids = concatenate([ids[segment] for segment in segments])[1:]
            tokenized[index] = before + answer_ids, len(before)
        if self.added_bos is not None:
            bos = [self.added_bos]
            tokenized = [
                (turn_ids, start) if turn_ids[:1] == bos and start else (bos + turn_ids, start + 1)
                for turn_ids, start in tokenized
            ]
        return tokenized


@dataclass(frozen=True, slots=True)
class _Turn:
    prompt: str
    answer: str  # with its end token


def _join_turns(row: int, turns: list[tuple[list[int], int]]) -> list[Encoded]:
    sequences: list[Encoded] = []
    for ids, start in turns:
        known = len(sequences[-1].input_ids) if sequences else 0
        if not known or known > start or ids[:known] != sequences[-1].input_ids:
            sequences.append(Encoded(row, ids, [False] * start + [True] * (len(ids) - start)))
        else:
            sequences[-1].input_ids.extend(ids[known:])
            sequences[-1].supervised.extend([False] * (start - known) + [True] * (len(ids) - start))
    return sequences
