"""Tokenizer parity: token ids of transformers and of llama.cpp are equal, special tokens included."""

from pathlib import Path

from lathe.common.errors import InputError
from lathe.gguf.llama_model import LlamaModel
from lathe.models.chat_template import ChatTemplate

# Texts on which tokenizers like to disagree. All are composed (Unicode NFC): Qwen's tokenizer composes,
# llama.cpp takes text as it is, so that a decomposed "e\u0301" never agrees there.
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Switch on the attic lamp at 9 o'clock, don't wait; I'll be there at 21:30!",
    "Größe, Straße, Übermut – „Anführungszeichen“ und ‚einfache‘",
    "L'été dernier, j'ai mangé où ? Ça coûte 3,50 €.",
    "¿Dónde está el baño? ¡Mañana será otro día!",
    "Съешь ещё этих мягких французских булок, да выпей чаю. 2024 год",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "敏捷的棕色狐狸跳过了懒狗。价格：１２３元",
    "いろはにほへと ちりぬるを。カタカナ、漢字とABC",
    "다람쥐 헌 쳇바퀴에 타고파",
    "السَّلامُ عَلَيْكُمْ ١٢٣",
    "שָׁלוֹם עוֹלָם",
    "नमस्ते दुनिया, कैसे हो?",
    "สวัสดีชาวโลก",
    "def f(x: int = 0) -> list[int]:\n    return [i ** 2 for i in range(x)]  # comment\n\n\tif a != b: pass",
    '{"action": "on", "device": "light", "value": null, "list": [1, 2.5, -3e-7]}',
    "<p class='x'>a &amp; b</p> SELECT * FROM t WHERE id=1; -- x",
    "https://example.com/a/b?c=d&e=%20f#g user@example.com C:\\Users\\x",
    "0 1 12 123 1234 12345 123456789 3.14159 1,000,000 0x1F 1e-10",
    "🙂 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ✨🚀",
    " one leading space",
    "  two leading, two  inside, two trailing  ",
    "tab\there\t\ttwo\nnewline\n\ntwo newlines\n\n\nthree\r\nwindows",
    "no\u00a0break, zero\u200bwidth, thin\u2009space, ideographic\u3000space",
    "é, ﬁ is not fi; ½ ² ™",
    "I'M SHOUTING, y'ALL'VE don't DON'T",
    "a",
    " ",
    "\n",
)


def check_tokens(model: Path, gguf: Path, texts: list[str], *, chat_template: str | None = None) -> int:
    """Check that the tokenizer in the folder `model` and llama.cpp with the file `gguf` give the same token ids.

    Compared are the ids of every text, special tokens in it recognised by both, and the prompt of a small
    chat rendered with the tokenizer's template: as training sees it, and as llama.cpp does, which adds a BOS
    if the vocabulary asks for one and the template has not written it. Both must have the same template,
    and the tokenizer's end-of-turn token (`eos_token`) must end a generation. Returns the number of tokens
    compared; raises InputError with the first difference. `chat_template` takes the place of the tokenizer's.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    compared = 0
    with LlamaModel(gguf, vocab_only=True) as vocabulary:
        for text in texts:
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            compared += _compare_ids(gguf, text, expected, vocabulary.tokenize(text))
        if not vocabulary.is_end(tokenizer.eos_token_id):
            raise InputError(
                f"{gguf}: {tokenizer.eos_token!r}, the tokenizer's eos_token, does not end a generation in llama.cpp; "
                f"mark it as a special token in the tokenizer of {model}",
                code="end-token-does-not-stop",
            )
        if tokenizer.chat_template:
            template, bos = ChatTemplate.of_tokenizer(tokenizer), tokenizer.bos_token_id
            if vocabulary.chat_template.text != template.text:
                raise InputError(
                    f"{gguf}: its chat template is not the one in {model}; convert again from this folder",
                    code="other-chat-template",
                )
            prompt = template.render([{"role": "user", "content": "Hello, 世界!"}], add_generation_prompt=True)
            expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if template.adds_bos and expected[:1] != [bos]:
                expected = [bos, *expected]
            if expected[:2] == [bos] * 2:
                raise InputError(
                    f"{model}: its chat template begins a prompt with two {tokenizer.bos_token!r}; remove one",
                    code="two-bos",
                )
            compared += _compare_ids(gguf, prompt, expected, vocabulary.tokenize_prompt(prompt))
    return compared


def _compare_ids(gguf: Path, text: str, expected: list[int], ids: list[int]) -> int:
    if expected != ids:
        raise InputError(
            f"{gguf}: the token ids of {text!r} differ: transformers {expected}, llama.cpp {ids}; "
            f"llama.cpp does not know this tokenizer well enough to run the model",
            code="token-ids-differ",
        )
    return len(ids)
