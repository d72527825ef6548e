"""What scores are worth, on known cases and against the packages that define them."""

import math
import random
import time
from typing import get_args

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from lathe.config.params import Evaluate
from lathe.evaluation import metric_order, metrics, text_metrics

OF_ROWS = ("bert_score", "tool_calls", "tool_calls_f1")  # that need more than the two texts
ALL = [name for name in get_args(get_args(Evaluate.model_fields["metrics"].annotation)[0]) if name not in OF_ROWS]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "кошка",
    "на",
    "коврике",
    "猫",
    "坐",
    "{",
    "}",
    '"a"',
    ":",
    "1",
    ".",
    "—",
    "é",
]
# 13a, sacrebleu's tokenizer, is about white space and punctuation: any text will do.
TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | st.text(max_size=30)


def score(metric, completions, references, normalize="none", answer_pattern=None):
    of_pair = text_metrics.select_statistics([metric], normalize=normalize, answer_pattern=answer_pattern)[metric]
    rows = np.array([of_pair(*pair) for pair in zip(completions, references, strict=True)], dtype=float)
    return float(metrics.compute_metric(metric, rows.sum(axis=0)))


def test_every_score_that_can_be_asked_for_is_computed():
    assert set(text_metrics.select_statistics(ALL, normalize="none", answer_pattern=None)) == set(ALL)


def test_exact_match_overlooks_white_space_at_the_ends_only():
    assert score("exact_match", ["a b ", "a  b", "A b"], ["a b"] * 3) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("normalize", "completion", "reference", "equal"),
    [
        ("none", "Yes.", "yes", False),
        ("text", "Yes.", "yes", True),
        ("text", "  in — «Paris»\n", "In Paris", True),
        ("text", "ЁЛКА!", "ёлка", True),
        ("text", "caf\u00e9", "cafe\u0301", True),
        ("text", "ﬁne", "fine", True),
        ("text", "no", "yes", False),
        ("text", "", "...", True),
        ("json", '{"b": 1.0, "a": [1]}', '{"a":[1],"b":1}', True),
        ("json", '{"a": true}', '{"a": 1}', False),
        ("json", '{"a": [2, 1]}', '{"a": [1, 2]}', False),
        ("json", '{"a": 1, "b": 2}', '{"a": 1}', False),
        ("json", "{}", "[]", False),
        ("json", "{}", "{ }", True),
        ("json", '{"a": {}}', '{"a": "dict"}', False),
        ("json", "not json ", "not json", True),
        ("json", "Not json", "not json", False),
        ("json", '{"a": 1', '{"a": 1}', False),
    ],
)
def test_what_exact_match_overlooks_is_chosen(normalize, completion, reference, equal):
    assert score("exact_match", [completion], [reference], normalize=normalize) == equal


@pytest.mark.parametrize(
    ("completion", "equal"),
    [
        ("6 * 7 = 42\n#### 42", True),
        ("#### 41\nNo:\n#### 42", True),
        ("The answer is 42", False),
        ("####42", False),
        ("", False),
    ],
)
def test_an_answer_pattern_compares_the_last_answer_alone(completion, equal):
    assert score("exact_match", [completion], ["7 * 6 = 42\n#### 42"], answer_pattern=r"#### (\S+)") == equal


def test_a_reference_without_the_answer_pattern_is_taken_whole():
    assert score("exact_match", ["So:\n#### 42"], ["42"], answer_pattern=r"#### (\S+)") == 1
    assert score("exact_match", ["42"], ["42"], answer_pattern=r"#### (\S+)") == 0


def test_a_group_that_took_no_part_in_the_match_is_an_empty_answer():
    assert score("exact_match", ["A"], ["#"], answer_pattern="A(b)?|#") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, e.g. at 3.14!", ["don", "t", "stop", "e", "g", "at", "3", "14"]),
        ("snake_case Straße", ["snake_case", "strasse"]),
        ("Съешь ещё", ["съешь", "ещё"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("猫は可愛い", list("猫は可愛い")),
        ("한국어 문장", ["한국어", "문장"]),
        ("iPhone手机15", ["iphone", "手", "机", "15"]),
        ("😀 …", []),
        ("", []),
    ],
)
def test_words_are_of_any_script(text, words):
    assert text_metrics.split_words(text) == words


def test_token_f1_counts_common_words_as_often_as_they_stand():
    # 2 of 3 words given, 2 of 4 wanted.
    assert score("token_f1", ["the The cat"], ["the cat sat down"]) == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert score("token_f1", ["", "", "a", "!"], ["", "a", "", "?"]) == pytest.approx(2 / 4)


def test_json_scores_are_those_of_the_rewards_and_need_references_that_are_json():
    assert score("json_valid", ['{"a":1}', '{"a":1', "3"], ['{"a":1}'] * 3) == pytest.approx(1 / 3)
    assert score("json_fields", ['{"a":1,"b":2}', "[]"], ['{"a":1}', '{"a":1}']) == pytest.approx((2 / 3) / 2)
    for metric in ("json_valid", "json_fields"):
        for reference in ("42", "plain text", ""):
            assert math.isnan(score(metric, ['{"a":1}'] * 2, ['{"a":1}', reference]))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # LCS "the cat sat": 3 of 3 words of the completion, 3 of 6 of the reference.
    assert score("rouge_l", ["the cat sat"], ["the cat sat on a mat"]) == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_rouge_reads_words_of_any_script():
    assert score("rouge_l", ["кошка сидит"], ["кошка сидит"]) == 1
    assert score("rouge_1", ["кошка сидит"], ["сидит кошка"]) == 1
    assert score("rouge_2", ["кошка сидит"], ["сидит кошка"]) == 0
    assert score("rouge_l", ["猫坐着"], ["猫站着"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("ours", "theirs"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_of_plain_english_is_that_of_rouge_score(ours, theirs):
    generator = random.Random(1)
    pairs = [[" ".join(generator.choices(WORDS[:6], k=generator.randint(0, 12))) for _ in range(2)] for _ in range(50)]
    reference = rouge_scorer.RougeScorer([theirs])
    expected = [reference.score(wanted, given)[theirs].fmeasure for given, wanted in pairs]
    assert score(ours, *zip(*pairs, strict=True)) == pytest.approx(sum(expected) / len(expected))


@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_corpus_scores_are_those_of_sacrebleu(pairs):
    given_, wanted = ([pair[side] for pair in pairs] for side in (0, 1))
    bleu = sacrebleu.BLEU(effective_order=True).corpus_score(given_, [wanted]).score
    assert score("bleu", given_, wanted) == pytest.approx(bleu, abs=1e-9)
    chrf = sacrebleu.CHRF().corpus_score(given_, [wanted]).score
    assert score("chrf", given_, wanted) == pytest.approx(chrf, abs=1e-9)


def test_bleu_is_sacrebleus_default_wherever_an_answer_has_four_words():
    given_ = ["the cat sat on a mat today", "a", "кошка на коврике"]
    wanted = ["the cat sat on the mat", "a cat", "кошка на коврике"]
    assert score("bleu", given_, wanted) == pytest.approx(sacrebleu.corpus_bleu(given_, [wanted]).score)
    assert score("bleu", ["a cat"], ["a cat"]) == pytest.approx(100)


def test_length_ratio_is_of_all_characters_together():
    assert score("length_ratio", ["aaaa", ""], ["a", "b"]) == 2
    assert math.isinf(score("length_ratio", ["a"], [""]))


def test_distinct_is_the_mean_over_answers_that_have_an_n_gram():
    assert score("distinct_1", ["a a b", "", "c"], ["?"] * 3) == pytest.approx((2 / 3 + 1) / 2)
    assert score("distinct_2", ["a b a b", "c"], ["?"] * 2) == pytest.approx(2 / 3)
    assert math.isnan(score("distinct_2", ["", "a"], ["?"] * 2))


@pytest.mark.parametrize("metric", ALL)
def test_no_answer_is_worth_nothing_and_the_reference_itself_everything(metric):
    references = ['{"action": "switch the lamp on", "room": "attic"}', '{"action": "switch the big lamp off"}']
    full = score(metric, references, references)
    if not metric.startswith("distinct"):
        assert score(metric, ["", ""], references) == 0
        assert full == pytest.approx(100 if metric in {"bleu", "chrf"} else 1)
    else:
        assert math.isnan(score(metric, ["", ""], references))
        assert 0 < full <= 1


@pytest.mark.parametrize("metric", ALL)
@given(completion=st.text(max_size=40), reference=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_two_texts_have_a_score_within_its_range_or_none(metric, completion, reference):
    value = score(metric, [completion], [reference])
    top = {"bleu": 100, "chrf": 100, "length_ratio": math.inf}.get(metric, 1)
    assert math.isnan(value) or 0 <= value <= top + 1e-9


@pytest.mark.parametrize("completion", ["[" * 100_000, "word " * 3000, "x" * 200_000, "9" * 50_000, "\x00\ud800"])
def test_an_answer_that_never_ends_is_scored_in_moments(completion):
    started = time.process_time()
    for metric in ALL:
        for normalize in ("none", "text", "json"):
            assert not score(metric, [completion], ['{"a": "some words"}'], normalize=normalize) > 1.1 or (
                metric == "length_ratio"
            ), metric
    assert time.process_time() - started < 10


def test_perplexity_is_that_of_all_tokens_together():
    assert metrics.compute_metric("perplexity", np.array([4 * math.log(3), 4.0])) == pytest.approx(3)
    assert math.isinf(metrics.compute_metric("perplexity", np.array([1e6, 1.0])))
    assert math.isnan(metrics.compute_metric("perplexity", np.array([0.0, 0.0])))


def test_the_combined_score_of_0_8234_and_78_5_is_0_8004():
    """As in docs/evaluation.md: 0.4 x 0.8234 + 0.6 x 78.50 / 100."""
    rows = 200
    sums = np.array([0.8234 * rows, rows, 78.5 * 100, 100])
    assert round(float(metrics.make_combined(0.4, 0.6)(sums)), 4) == 0.8004
    assert float(metrics.make_combined(0.4, None)(sums)) == pytest.approx(0.8234)


def test_better_is_higher_but_for_perplexity_and_its_like_and_nearer_to_1_for_a_ratio_of_lengths():
    assert metric_order.orient_score("exact_match", 0.9) > metric_order.orient_score("exact_match", 0.8)
    for metric in ("perplexity", "kl", "general_perplexity", "bytes"):
        assert metric_order.orient_score(metric, 1.1) > metric_order.orient_score(metric, 1.2)
    assert metric_order.orient_score("length_ratio", 0.9) > metric_order.orient_score("length_ratio", 1.2)
    assert metric_order.orient_score("rouge_l", None) < metric_order.orient_score("rouge_l", 0.0)
