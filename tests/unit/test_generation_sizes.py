"""Sizes of a generation that are auto: what the held-out rows need, and no less."""

from conftest import changed
from refusals import refused
from toy import load_toy

from lathe.inference.generation_sizes import GenerationSizes, choose_sizes


def report(**lengths):
    """A report of the stage preprocess: the longest prompt and answer of each split."""
    return {
        "splits": [
            {
                "split": split,
                "kept": 1 if prompt else 0,
                "tokens": {"total": {"max": prompt + answer}},
                "references": {"tokens": {"max": answer}, "conversation_tokens": {"max": prompt + answer}},
            }
            for split, (prompt, answer) in lengths.items()
        ]
    }


def sizes(**values):
    return changed(load_toy().params, {f"generate.{key}": value for key, value in values.items()}).generate


ROWS = report(train=(900, 300), validation=(700, 80), test=(650, 101))
AUTO = {"max_new_tokens": "auto", "n_ctx": "auto"}


def test_numbers_are_taken_as_they_are():
    assert choose_sizes(sizes(max_new_tokens=7, n_ctx=99), {"splits": []}) == GenerationSizes(7, 99)


def test_auto_has_room_for_the_longest_held_out_row_and_a_quarter_more():
    chosen = choose_sizes(sizes(**AUTO), ROWS)
    assert chosen.max_new_tokens == 128  # 1.25 * 101 is 126.25; a multiple of 8
    assert chosen.n_ctx % 64 == 0
    assert 700 + 128 < chosen.n_ctx <= 700 + 80 + 128 + 64


def test_a_reference_longer_than_the_longest_answer_fits_into_the_context():
    chosen = choose_sizes(sizes(max_new_tokens=10, n_ctx="auto"), ROWS)
    assert chosen.max_new_tokens == 10
    assert chosen.n_ctx > 700 + 101


def test_examples_before_the_prompts_have_room():
    assert choose_sizes(sizes(**AUTO), ROWS, examples=4).n_ctx > 4 * 1200 + 780 + 128


def test_short_rows_leave_a_context_in_which_general_text_is_scored_alike():
    assert choose_sizes(sizes(**AUTO), report(train=(9, 3), test=(7, 2))).n_ctx == 512


def test_without_a_held_out_row_a_number_is_asked_for():
    with refused("no-held-out-rows", "generate"):
        choose_sizes(sizes(**AUTO), report(train=(9, 3), validation=(0, 0), test=(0, 0)))
