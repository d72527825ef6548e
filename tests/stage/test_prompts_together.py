# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""Prompts decoded several at a time: the same logits, bit for bit, as one after another."""

from pathlib import Path

import numpy as np
import pytest
from base_models import make
from gguf_models import Made, convert, learnt  # noqa: F401 - fixture

from lathe.gguf.quantize import quantize
from lathe.inference.generate import Generator, decode_prompt
from lathe.inference.kv_cache import KVCache
from lathe.inference.shared_prefix import SequenceStats, TokenSequence

ROWS = 40
LONGEST = 200  # tokens of a prompt


def decode(file: Path, *, together: bool, n_parallel: int = 16) -> tuple[dict[tuple[int, int], bytes], list[int]]:
    """Return the logits of every row after each of its lengths, and how many prompts each pass decoded."""
    logits: dict[tuple[int, int], bytes] = {}
    passes = []
    numbers = np.random.default_rng(1)

    def choose(rows, values):
        if len(rows[0].tokens) == lengths[rows[0].number]:
            passes.append(len(rows))
        for row, of_row in zip(rows, values, strict=True):
            logits[row.number, len(row.tokens)] = of_row.tobytes()
        return values.argmax(axis=1).tolist()

    with Generator(file, n_parallel=n_parallel, n_ctx=256, threads=1) as generator:
        # Lengths that are alike, as those of real prompts, and a long one now and then.
        lengths = [LONGEST if number % 9 == 4 else int(numbers.integers(24, 34)) for number in range(ROWS)]
        some = numbers.integers(10, 200, (ROWS, LONGEST))
        prompts = [[*range(10, 20), *map(int, row[: length - 10])] for row, length in zip(some, lengths, strict=True)]

        def read_rows():
            return (TokenSequence.of(number, prompt, n_ctx=256) for number, prompt in enumerate(prompts))

        answers = dict(
            generator.answer_sequences(
                read_rows(),
                SequenceStats.of(read_rows()),
                max_new_tokens=6,
                decode=None if together else decode_prompt,
                choose=choose,
            )
        )
    assert sorted(answers) == list(range(ROWS))
    return logits, passes


def check(file: Path) -> list[int]:
    alone, passes = decode(file, together=False)
    assert set(passes) == {1}
    together, passes = decode(file, together=True)
    assert together == alone
    assert decode(file, together=True, n_parallel=9)[0] == alone
    return passes


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_prompts_decoded_together_have_the_logits_that_each_has_alone(learnt: Made, tmp_path, kind):
    file = learnt.gguf
    if kind != "F16":
        quantize(learnt.gguf, file := tmp_path / "model.gguf", type=kind, threads=1)
    passes = check(file)
    assert max(passes) >= 8, passes
    assert len(passes) < 0.7 * ROWS, passes


@pytest.mark.parametrize(
    ("name", "are_grouped"),
    [
        ("Gemma3ForConditionalGeneration", True),  # attends to a window that is shorter than the long prompts
        pytest.param("Qwen3MoeForCausalLM", True, marks=pytest.mark.slow),
        pytest.param("GptOssForCausalLM", True, marks=pytest.mark.slow),
        pytest.param("Lfm2ForCausalLM", False, marks=pytest.mark.slow),
        pytest.param("Qwen3_5ForCausalLM", False, marks=pytest.mark.slow),
    ],
)
def test_so_do_those_of_other_kinds_and_a_model_that_cannot_forget_gets_them_alone(tmp_path, name, are_grouped):
    make(name, tmp_path / "base")
    file = convert(tmp_path / "base", tmp_path / "model.gguf")
    passes = check(file)
    assert (max(passes) > 1) == are_grouped


def test_sequences_fed_together_go_on_as_if_each_had_been_alone(learnt: Made):
    prompts = {0: list(range(10, 40)), 1: list(range(20, 31)), 2: list(range(50, 75))}
    with Generator(learnt.gguf, n_parallel=8, n_ctx=64, threads=1) as generator:

        def make_cache() -> KVCache:
            return generator.make_cache(slots=3, length=64, min_rows=8)

        with make_cache() as together, make_cache() as alone:
            first = together.feed_to_end(prompts).copy()
            for slot, tokens in prompts.items():
                assert (alone.feed_to_end({slot: tokens})[0] == first[slot]).all()
                assert together.length(slot) == alone.length(slot) == len(tokens)
            assert (together.step([7, 8, 9]) == alone.step([7, 8, 9])).all()
