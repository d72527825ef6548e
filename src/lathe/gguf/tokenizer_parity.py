"""Tokenizer parity: token ids of transformers and of llama.cpp are equal, special tokens included.

Strict are the texts that a model is trained on, the special and added tokens, the BOS and the end of a turn. Of sample
texts in other scripts a difference may be only reported: `convert.tokenizer_parity`.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lathe.common.errors import InputError
from lathe.common.text import shorten_value
from lathe.gguf.llama_model import LlamaModel
from lathe.models.loss_mask import encode
from lathe.models.tokenizer_template import read_chat_template

logger = logging.getLogger(__name__)

CHAT = ({"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"})

TEXTS_PER_BATCH = 256
SHOWN_TOKENS = 4  # of a long text, on either side of the first difference
MOST_ADDED_TOKENS = 2000  # that are compared one by one

# Texts on which tokenizers like to disagree, by what they hold. All are composed (Unicode NFC): Qwen's tokenizer
# composes, llama.cpp takes text as it is, so that a decomposed "e\u0301" never agrees there.
SAMPLES = (
    ("English", "The quick brown fox jumps over the lazy dog."),
    ("English", "Switch on the attic lamp at 9 o'clock, don't wait; I'll be there at 21:30!"),
    ("German", "Größe, Straße, Übermut – „Anführungszeichen“ und ‚einfache‘"),
    ("French", "L'été dernier, j'ai mangé où ? Ça coûte 3,50 €."),
    ("Spanish", "¿Dónde está el baño? ¡Mañana será otro día!"),
    ("Cyrillic", "Съешь ещё этих мягких французских булок, да выпей чаю. 2024 год"),
    ("Greek", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία"),
    ("Chinese", "敏捷的棕色狐狸跳过了懒狗。价格：１２３元"),
    ("Japanese", "いろはにほへと ちりぬるを。カタカナ、漢字とABC"),
    ("Korean", "다람쥐 헌 쳇바퀴에 타고파"),
    ("Arabic", "السَّلامُ عَلَيْكُمْ ١٢٣"),
    ("Hebrew", "שָׁלוֹם עוֹלָם"),
    ("Devanagari", "नमस्ते दुनिया, कैसे हो?"),
    ("Thai", "สวัสดีชาวโลก"),
    ("code", "def f(x: int = 0) -> list[int]:\n    return [i ** 2 for i in range(x)]  # comment\n\n\tif a != b: pass"),
    ("JSON", '{"action": "on", "device": "light", "value": null, "list": [1, 2.5, -3e-7]}'),
    ("markup", "<p class='x'>a &amp; b</p> SELECT * FROM t WHERE id=1; -- x"),
    ("addresses", "https://example.com/a/b?c=d&e=%20f#g user@example.com C:\\Users\\x"),
    ("digits", "0 1 12 123 1234 12345 123456789 3.14159 1,000,000 0x1F 1e-10"),
    ("emoji", "🙂 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ✨🚀"),
    ("leading space", " one leading space"),
    ("several spaces", "  two leading, two  inside, two trailing  "),
    ("line breaks", "tab\there\t\ttwo\nnewline\n\ntwo newlines\n\n\nthree\r\nwindows"),
    ("unusual spaces", "no\u00a0break, zero\u200bwidth, thin\u2009space, ideographic\u3000space"),
    ("ligatures and signs", "é, ﬁ is not fi; ½ ² ™"),
    ("capitals", "I'M SHOUTING, y'ALL'VE don't DON'T"),
    ("one letter", "a"),
    ("one space", " "),
    ("one line break", "\n"),
)
SAMPLE_TEXTS = tuple(text for _, text in SAMPLES)


class TokenIdsError(InputError):
    """Token ids that differ; `number` is that of the text among those given, None for another text.

    `difference` says how, of a long text only where they begin to differ.
    """

    def __init__(self, subject: str, text: str, expected: list[int], ids: list[int], number: int | None) -> None:
        self.text, self.number = text, number
        if len(expected) <= 2 * SHOWN_TOKENS:
            where = ""
        else:
            pairs = zip(expected, ids, strict=False)
            first = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(ids)))
            shown = slice(max(0, first - SHOWN_TOKENS), first + SHOWN_TOKENS)
            expected, ids, where = expected[shown], ids[shown], f" from token {first} on"
        self.difference = f"differ{where}: transformers {expected}, llama.cpp {ids}"
        super().__init__(
            f"{subject}: the token ids of {shorten_value(text)} {self.difference}; llama.cpp does not know this "
            "tokenizer well enough to run the model",
            code="token-ids-differ",
        )


@dataclass(frozen=True)
class Parity:
    """What was compared: token ids of the given texts and of everything, and the sample texts that differ by kind."""

    texts: int
    tokens: int
    differing_samples: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return it for a metric file, in lists, of which DVC makes no columns."""
        return {
            "texts_compared": self.texts,
            "tokens_compared": self.tokens,
            "differing_samples": list(self.differing_samples),
        }


def check_tokens(model: Path, gguf: Path, texts: Sequence[str], *, chat_template: str | None = None) -> int:
    """Check that the tokenizer in the folder `model` and llama.cpp with the file `gguf` give the same token ids.

    As `compare_tokenizers`; every text is strict, and no other sample is compared. Returns the number of tokens
    compared.
    """
    return compare_tokenizers(model, gguf, texts, samples=None, chat_template=chat_template).tokens


def compare_tokenizers(
    model: Path,
    gguf: Path,
    texts: Iterable[str],
    *,
    samples: Literal["rows", "strict"] | None,
    shown: str | None = None,
    chat_template: str | None = None,
) -> Parity:
    """Compare the token ids of the tokenizer in the folder `model` with those of llama.cpp with the file `gguf`.

    Compared are the ids of every text, special tokens in it recognised by both, of every special and added token, and
    of the prompt of a small chat rendered with the tokenizer's template: as training sees it, and as llama.cpp does,
    which adds a BOS if the vocabulary asks for one and the template has not written it. Both must have the same
    template, and the tokenizer's end-of-turn token (`eos_token`) must end a generation. Raises InputError with the
    first difference; its message begins with `shown`, by default the path of the file. `chat_template` takes the place
    of the tokenizer's.

    `SAMPLES` are compared too: with "strict" a difference is an error, with "rows" a warning that names what differs.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    subject = shown or str(gguf)
    with LlamaModel(gguf, vocab_only=True) as vocabulary:
        count, compared = 0, 0
        for batch in _iterate_batches(texts):
            for text, ids in zip(batch, tokenizer(batch, add_special_tokens=False)["input_ids"], strict=True):
                compared += _compare_ids(subject, text, ids, vocabulary.tokenize(text), number=count)
                count += 1
        compared += _compare_added_tokens(subject, tokenizer, vocabulary)
        if not vocabulary.is_end(tokenizer.eos_token_id):
            raise InputError(
                f"{subject}: {tokenizer.eos_token!r}, the tokenizer's eos_token, does not end a generation in "
                f"llama.cpp; mark it as a special token in the tokenizer of {shown or model}",
                code="end-token-does-not-stop",
            )
        if tokenizer.chat_template:
            compared += _compare_prompts(subject, str(shown or model), tokenizer, vocabulary)
            _check_end(subject, tokenizer, vocabulary)
        differing = []
        for kind, text in SAMPLES if samples else ():
            expected, ids = tokenizer(text, add_special_tokens=False)["input_ids"], vocabulary.tokenize(text)
            compared += len(ids)
            if expected != ids and samples == "strict":
                _compare_ids(subject, text, expected, ids)
            if expected != ids:
                differing.append(kind)
    if differing:
        logger.warning(
            "%s: llama.cpp gives other token ids than its tokenizer for sample texts (%s); rows of such texts are "
            "refused before training; the trained model may answer them worse",
            shown or model.name,
            ", ".join(differing),
        )
    return Parity(count, compared, tuple(differing))


def _check_end(subject: str, tokenizer: Any, vocabulary: LlamaModel) -> None:
    """Raise InputError where an answer that ends as in training would not end in llama.cpp."""
    [row, *_] = encode(tokenizer, [CHAT], supervise="last")
    last = max(at for at, is_supervised in enumerate(row.supervised) if is_supervised)
    if not vocabulary.is_end(row.input_ids[last]):
        ending = tokenizer.convert_ids_to_tokens(row.input_ids[last])
        raise InputError(
            f"{subject}: answers end with {ending!r} in training, which does not end a generation in llama.cpp; set "
            f"eos_token in tokenizer_config.json to it, and mark it as a special token",
            code="end-token-does-not-stop",
        )


def _compare_prompts(subject: str, folder: str, tokenizer: Any, vocabulary: LlamaModel) -> int:
    template, bos = read_chat_template(tokenizer), tokenizer.bos_token_id
    if vocabulary.chat_template.text != template.text:
        raise InputError(
            f"{subject}: its chat template is not the one in {folder}; convert again from this folder",
            code="other-chat-template",
        )
    prompt = template.render([{"role": "user", "content": "Hello, 世界!"}], add_generation_prompt=True)
    expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if template.adds_bos and expected[:1] != [bos]:
        expected = [bos, *expected]
    if expected[:2] == [bos] * 2:
        raise InputError(
            f"{folder}: its chat template begins a prompt with two {tokenizer.bos_token!r}; remove one",
            code="two-bos",
        )
    return _compare_ids(subject, prompt, expected, vocabulary.tokenize_prompt(prompt))


def _compare_added_tokens(subject: str, tokenizer: Any, vocabulary: LlamaModel) -> int:
    """Compare the ids of special and added tokens, the special ones first."""
    added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: (not item[1].special, item[0]))
    texts = [token.content for _, token in added[:MOST_ADDED_TOKENS]]
    compared = 0
    for text, expected in zip(
        texts, tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [], strict=True
    ):
        compared += _compare_ids(subject, text, expected, vocabulary.tokenize(text))
    return compared


def _iterate_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, TEXTS_PER_BATCH)):
        yield batch


def _compare_ids(subject: str, text: str, expected: list[int], ids: list[int], number: int | None = None) -> int:
    if expected != ids:
        raise TokenIdsError(subject, text, expected, ids, number)
    return len(ids)
