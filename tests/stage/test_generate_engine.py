# ruff: noqa: F811 - fixtures are imported, then named as arguments
import re

import pytest
from gguf_models import Made, countdown, tiny  # noqa: F401 - fixtures
from refusals import refused

from lathe.gguf.quantize import quantize
from lathe.inference import generate
from lathe.inference.generate import Generator

END = 4  # `<|im_end|>`

PROMPTS = [
    f"<s><|im_start|>user\nplease switch {'on' if n % 2 else 'off'} the attic lamp at {n}:30{' now' * (n % 7)}"
    f"<|im_end|>\n<|im_start|>assistant\n"
    for n in range(19)
]


def open_generator(path, n_parallel=8, n_ctx=512, threads=1):
    return Generator(path, n_parallel=n_parallel, n_ctx=n_ctx, threads=threads)


def test_every_answer_is_the_known_one_and_stays_with_its_prompt(countdown: Made):
    with open_generator(countdown.gguf) as generator:
        # Last tokens from all over the vocabulary: answers of many lengths, so that slots are refilled often.
        prompts = ["<s>please switch on" + letter for letter in "lampatticswitchoff :30zäx7!Q"] * 3
        answers = generator.complete(prompts, max_new_tokens=300)
        for prompt, answer in zip(prompts, answers, strict=True):
            last = generator.tokenize(prompt)[-1]
            counted = b"".join(generator.model.get_token_bytes(token) for token in range(last - 1, END, -1))
            expected = (last - END, "stop") if last - END <= 300 else (300, "length")
            assert (answer.tokens, answer.finish_reason) == expected
            if answer.finish_reason == "stop":
                assert answer.text == counted.decode("utf-8", "replace")
    assert len({answer.tokens for answer in answers}) > 4


# In exact arithmetic a row's logits do not depend on its neighbours. In floats they would, because llama.cpp takes
# other kernels for one row, for a few and for many; `KVCache` keeps to one of them: equal needs no tolerance here.
@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K_M", "Q4_1"])
def test_answers_do_not_depend_on_how_many_rows_are_decoded_together(tiny: Made, tmp_path, quant):
    path = tmp_path / "model.gguf"
    quantize(tiny.gguf, path, type=quant, threads=2)
    with open_generator(path) as generator:
        one_by_one = [generator.complete([prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
        assert generator.complete(PROMPTS, max_new_tokens=8) == one_by_one
    with open_generator(path, n_parallel=15, threads=2) as generator:
        assert generator.complete(PROMPTS, max_new_tokens=8) == one_by_one
    assert len({answer.text for answer in one_by_one}) > 10


def test_each_token_is_the_one_transformers_ranks_first(tiny: Made):
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    with open_generator(tiny.gguf) as generator:
        for prompt in PROMPTS[:3]:
            tokens = generator.tokenize(prompt)
            assert generator.complete([prompt], max_new_tokens=10)[0].tokens == 10
            for _ in range(10):
                [answer] = generator.complete([prompt], max_new_tokens=1)
                with torch.no_grad():
                    logits = model(torch.tensor([tokens])).logits[0, -1]
                # Rounding to f16 may swap two tokens that are as good as equal.
                likely = torch.nonzero(logits > logits.max() - 0.05).flatten().tolist()
                pieces = {generator.model.get_token_bytes(token).decode("utf-8", "replace"): token for token in likely}
                assert answer.text in pieces
                tokens.append(pieces[answer.text])
                prompt += answer.text
                if generator.tokenize(prompt) != tokens:
                    break  # the text so far is no longer split into the tokens that were generated


def test_what_all_prompts_begin_with_is_decoded_once(tiny: Made, monkeypatch):
    fed = []
    feed = generate.KVCache.feed

    def counting_feed(self, slot, tokens, *, first_output):
        before = self.length(slot)
        logits = feed(self, slot, tokens, first_output=first_output)
        fed.append(self.length(slot) - before)
        return logits

    monkeypatch.setattr(generate.KVCache, "feed", counting_feed)
    system = "<s><|im_start|>system\n" + "you look after the lamps of the house; " * 5 + "<|im_end|>\n"
    with open_generator(tiny.gguf) as generator:
        prompts = [system + prompt.removeprefix("<s>") for prompt in PROMPTS]
        generator.complete(prompts, max_new_tokens=2)
        prefix, total = len(generator.tokenize(system)), sum(len(generator.tokenize(prompt)) for prompt in prompts)
    assert fed[0] >= prefix
    assert sum(fed) <= total - prefix * (len(prompts) - 1)


def test_a_prompt_has_exactly_one_bos(tiny: Made):
    with open_generator(tiny.gguf) as generator:
        assert generator.tokenize("<s>lamp") == generator.tokenize("lamp")
        assert generator.tokenize("lamp")[0] == generator.model.bos
        assert generator.tokenize("lamp").count(generator.model.bos) == 1
        assert (generator.chat_template.bos_token, generator.chat_template.eos_token) == ("<s>", "<|im_end|>")


def test_a_prompt_that_fills_the_context_is_refused_by_its_row(tiny: Made):
    with open_generator(tiny.gguf, n_ctx=32) as generator:
        with refused("prompt-too-long", "row 1: ", "context of 32") as caught:
            generator.complete(["lamp", "please switch on the lamp " * 20], max_new_tokens=4)
        assert re.match(r"row 1: \d+ tokens leave no room for an answer", str(caught.value))
        assert [answer.finish_reason for answer in generator.complete(["lamp"], max_new_tokens=100)] == ["length"]


def test_no_rows_give_no_answers(tiny: Made):
    with open_generator(tiny.gguf) as generator:
        assert generator.complete([], max_new_tokens=4) == []


def test_a_streamed_answer_is_the_answer_and_a_longer_conversation_goes_on_from_it(tiny: Made, monkeypatch):
    fed = []
    with open_generator(tiny.gguf) as generator:
        [answer] = generator.complete(PROMPTS[:1], max_new_tokens=20)
        assert "".join(generator.stream(PROMPTS[0], max_new_tokens=20)) == answer.text
        feed = generate.KVCache.feed

        def noting_feed(self, slot, tokens, **options):
            fed.append(len(tokens) - self.length(slot))
            return feed(self, slot, tokens, **options)

        monkeypatch.setattr(generate.KVCache, "feed", noting_feed)
        longer = PROMPTS[0] + "lamp<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n"
        [expected] = generator.complete([longer], max_new_tokens=20)
        fed.clear()
        assert "".join(generator.stream(longer, max_new_tokens=20)) == expected.text
        assert fed == [len(generator.tokenize(longer)) - len(generator.tokenize(PROMPTS[0]))]


def test_an_abandoned_stream_leaves_a_usable_cache(tiny: Made):
    with open_generator(tiny.gguf) as generator:
        stream = generator.stream(PROMPTS[0], max_new_tokens=20)
        next(stream)
        stream.close()
        [expected] = generator.complete(PROMPTS[1:2], max_new_tokens=20)
        assert "".join(generator.stream(PROMPTS[1], max_new_tokens=20)) == expected.text


def test_rows_are_read_as_slots_become_free_and_answers_given_as_they_are_finished(tiny: Made):
    read: list[int] = []

    def prompts():
        read.clear()
        for number, prompt in enumerate(PROMPTS * 4):
            read.append(number)
            yield prompt

    with open_generator(tiny.gguf) as generator:
        completions = generator.iterate_completions(prompts, max_new_tokens=4)
        first, _ = next(completions)
        assert len(read) <= 8 + 1
        assert sorted([first, *(number for number, _ in completions)]) == list(range(4 * len(PROMPTS)))


def test_rows_that_are_done_are_not_answered_again_and_the_others_get_the_same_answers(tiny: Made):
    with open_generator(tiny.gguf) as generator:
        whole = dict(generator.iterate_completions(lambda: PROMPTS, max_new_tokens=8))
        done = set(range(0, len(PROMPTS), 3))
        rest = dict(generator.iterate_completions(lambda: PROMPTS, max_new_tokens=8, finished=done))
        assert rest == {number: answer for number, answer in whole.items() if number not in done}
        assert dict(generator.iterate_completions(lambda: PROMPTS, max_new_tokens=8, finished=set(whole))) == {}
