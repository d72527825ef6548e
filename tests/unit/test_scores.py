import pytest

from lathe import scores


def test_exact_match_ignores_white_space_at_the_ends_only():
    assert scores.exact_match(["a b ", "a  b", "A b"], ["a b", "a b", "a b"]) == pytest.approx(1 / 3)


def test_json_valid_counts_completions_that_parse():
    assert scores.json_valid(['{"a":1}', '{"a":1', "3"], ['{"a":1}'] * 3) == pytest.approx(2 / 3)


def test_json_valid_does_not_apply_where_a_reference_is_no_json_object():
    assert scores.json_valid(['{"a":1}'], ["42"]) is None
    assert scores.json_valid(['{"a":1}'], ["plain text"]) is None
    assert scores.json_valid(['{"a":1}'], [""]) is None


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # LCS "the cat sat": 3 of 3 words of the completion, 3 of 6 of the reference.
    assert scores.rouge_l(["the cat sat"], ["the cat sat on a mat"]) == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_rouge_l_reads_words_of_any_script():
    assert scores.rouge_l(["кошка сидит"], ["кошка сидит"]) == 1
    assert scores.rouge_l(["кошка сидит"], ["собака лежит"]) == 0


def test_every_metric_that_can_be_asked_for_is_computed():
    from typing import get_args

    from lathe.params import Evaluate

    metadata = Evaluate.model_fields["metrics"].annotation
    assert set(get_args(get_args(metadata)[0])) == set(scores.METRICS)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="0 completions for 0 references"):
        scores.score(["exact_match"], [], [])
