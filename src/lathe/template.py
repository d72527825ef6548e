"""From chat messages to text and token ids, through the model's own chat template.

One template everywhere: training, evaluation and generation call `render`, and `encode` tokenises what it returns.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lathe.errors import InputError

Message = Mapping[str, Any]
Conversation = Sequence[Message]

# What `strftime_now` formats in templates that state the date (Llama 3, SmolLM3); the current date would make two runs
# differ. It is the fallback that Llama 3's own template holds.
TODAY = datetime(2024, 7, 26)

# The tokenizer spreads a batch over the cores; the ids of a larger one no longer lie in the caches of the processor.
ROWS_PER_BATCH = 128

_TEXT_MESSAGE = {"role", "content"}


class TemplateError(InputError):
    """A conversation that the chat template cannot render as a prompt and an answer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sequence.

    `input_ids` and `supervised` have one entry per token; `row` is the index of the conversation it came from.
    """

    row: int
    input_ids: list[int]
    supervised: list[bool]


def render(
    chat_template: str,
    messages: Conversation,
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Return the messages as the model reads them; with `add_generation_prompt`, up to where its answer begins.

    The text holds whatever special tokens the template writes, BOS among them, so it is tokenised without adding any.
    A template that asks for the date gets a fixed one. Raises TemplateError where the template refuses the messages.
    """
    try:
        template, known = _compiled(chat_template)
        if tools is None and all(map(_is_text_message, messages)):
            # What render_jinja_template adds, copies of the messages above all, takes longer than the rendering.
            context = {
                **known,
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": bos_token,
                "eos_token": eos_token,
            }
            return "".join(template.root_render_func(template.new_context(context, shared=True)))
        texts, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template's line {error.lineno} is not valid Jinja: {_line(error)}") from None
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise TemplateError(
            f"the chat template refuses the roles [{roles}]: {_line(error)}; give conversations in its form"
        ) from None
    return texts[0]


def render_for(tokenizer: Any, messages: Conversation, *, add_generation_prompt: bool = False) -> str:
    """Return `render` with a Hugging Face tokenizer's template and special tokens."""
    return render(
        tokenizer.chat_template,
        messages,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        add_generation_prompt=add_generation_prompt,
    )


def prompt_and_answer(
    chat_template: str, messages: Conversation, *, bos_token: str, eos_token: str
) -> tuple[str, str, str]:
    """Return the prompt of the last message, the answer as the template writes it behind, and what it adds at the end.

    The prompt is the one of inference. The three texts make up `render(messages)`, but for a template that writes
    earlier messages otherwise once there is an answer; the last begins with the end token, after white space perhaps.
    Raises TemplateError where an answer is not written behind the prompt, or not as it is.
    """
    prompt = render(chat_template, messages[:-1], bos_token=bos_token, eos_token=eos_token, add_generation_prompt=True)
    whole = render(chat_template, messages, bos_token=bos_token, eos_token=eos_token)
    if not whole.startswith(prompt):
        # Mistral Nemo's writes the system message only where a request comes last: then the answer is written as
        # behind that request alone.
        start = max((at for at, message in enumerate(messages[:-1]) if message["role"] == "user"), default=0)
        if start > 0:
            return prompt, *prompt_and_answer(
                chat_template, messages[start:], bos_token=bos_token, eos_token=eos_token
            )[1:]
        raise TemplateError(
            f"the chat template's generation prompt ends with {prompt[-20:]!r}, but its answers do not begin so; "
            "use a template whose generation prompt is how it writes answers"
        )
    written = whole[len(prompt) :]
    # Reasoning before the answer proper is rewritten by many templates; the answer itself is only stripped.
    answer = str(messages[-1]["content"]).rpartition("</think>")[2].strip()
    if answer not in written:
        raise TemplateError(f"the chat template does not write the answer {_shown(answer)} as it is; use one that does")
    for message in messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            _check_tools_are_written(message, written if message is messages[-1] else prompt)
    if messages[-1].get("tool_calls"):
        # Where calls end only the template knows: they take the place of a text, so what ends that ends them.
        text = [*messages[:-1], {"role": "assistant", "content": "an answer"}]
        _, _, rest = prompt_and_answer(chat_template, text, bos_token=bos_token, eos_token=eos_token)
        end = len(written.removesuffix(rest).rstrip())
        if not written.endswith(rest):
            raise TemplateError("the chat template ends a tool call in another way than a text; use one that does not")
    else:
        end = written.index(answer) + len(answer)
    return prompt, written[:end], written[end:]


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


def answer_lead(chat_template: str, *, bos_token: str, eos_token: str) -> str:
    r"""Return what the template writes between its generation prompt and a plain answer, white space aside.

    Empty for most; `<think>\n\n</think>\n\n` for Qwen3. A model trained by `encode` begins its completions with it, so
    it is to be removed before a completion is compared with the bare answer.
    """
    probe = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    _, written, _ = prompt_and_answer(chat_template, probe, bos_token=bos_token, eos_token=eos_token)
    lead = written.removesuffix("an answer")
    return lead if lead.strip() else ""


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the texts that the tokenizer reads as control tokens, such as `<|im_end|>` or `</s>`.

    A message that holds one would end its own turn. The unknown token is not among them.
    """
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    tokens.discard(tokenizer.unk_token)
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


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


@lru_cache
def _compiled(chat_template: str) -> tuple[jinja2.Template, dict[str, Any]]:
    """Return the template as transformers compiles it, and what it knows besides the conversation."""
    template = _compile_jinja_template(chat_template)
    template.environment.globals["strftime_now"] = TODAY.strftime
    return template, dict(template.globals)


def _is_text_message(message: Message) -> bool:
    return message.keys() == _TEXT_MESSAGE and isinstance(message["content"], str)


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


def _common_length(prompt: list[str], whole: list[str], ids: dict[str, list[int]]) -> int | None:
    """Return how many ids the prompt has if the whole begins with them, else None; both are given in segments."""
    if not prompt:
        return 0
    *before, last = prompt
    place = len(before)
    if len(whole) < len(prompt) or whole[:place] != before or ids[whole[place]][: len(ids[last])] != ids[last]:
        return None
    return sum([len(ids[segment]) for segment in prompt])


def _ids(tokenizer: Any, segments: Iterable[str]) -> dict[str, list[int]]:
    """Return the ids of each segment; one that several texts share is tokenised once."""
    unique = list(dict.fromkeys(segments))
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encoded = backend.encode_batch_fast(unique, add_special_tokens=False)
    return {segment: encoding.ids for segment, encoding in zip(unique, encoded, strict=True)}


def _concatenated(parts: list[list[int]]) -> list[int]:
    whole: list[int] = []
    for part in parts:
        whole += part
    return whole


def _segments(starts: re.Pattern[str], text: str) -> list[str]:
    cuts = [match.start() for match in starts.finditer(text)]
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < stop]


def _segment_starts(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the special tokens before which a text can be cut without changing its ids.

    The tokenizer looks for added tokens first, from left to right, and tokenises what lies between them piece by piece.
    That makes a cut safe before a token that is sought in the text as it stands, needs no neighbours to be found, takes
    no white space from the left, and cannot lose its first characters to another added token.
    """
    if tokenizer.backend_tokenizer.encode_special_tokens:
        return re.compile("(?!)")
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content and not token.normalized]
    texts = {token.content for token in added}
    safe = sorted(
        token.content
        for token in added
        if token.special
        and not (token.single_word or token.lstrip or token.content[0].isspace())
        and not any(_can_cover(other, token.content) for other in texts)
    )
    return re.compile("|".join(map(re.escape, safe)) or "(?!)")


def _can_cover(other: str, token: str) -> bool:
    """Tell whether `other`, found from further left in a text, can hold the first characters of `token`."""
    start = other.find(token[0], 1)
    while start > 0:
        if token.startswith(other[start:]) or other.startswith(token, start):
            return True
        start = other.find(token[0], start + 1)
    return False


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


def _check_tools_are_written(message: Message, rendered: str) -> None:
    """Raise TemplateError where a tool's answer, or a call of one, is not in the rendering."""
    expected = [str(message["content"]).strip()] if message["role"] == "tool" else []
    for call in message.get("tool_calls") or []:
        expected += [call["function"]["name"], *call["function"]["arguments"]]
    for text in expected:
        if text not in rendered and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered:
            what = "tool message" if message["role"] == "tool" else "tool call"
            raise TemplateError(f"the chat template does not write the {what} {_shown(text)}; use one that does")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
