import math
import random

import pytest

from lathe.evaluation import answer_checks

ANSWER = '{"action":"set","device":"lamp","room":"attic","value":40}'
GSM8K = r"#### (\S+)"


def test_exact_match_ignores_white_space_at_the_ends_only():
    assert answer_checks.exact_match(" a b\n", "a b") == 1
    assert answer_checks.exact_match("a  b", "a b") == 0
    assert answer_checks.exact_match("A b", "a b") == 0


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("1200.5", "1,200.50"),
        ("1\u202f200", "1200"),
        ("1'200", "1200"),
        ("12,345,678", "12345678"),
        ("-5", "\N{MINUS SIGN}5"),
        ("-$5.00", "-5"),
        ("+7", "7"),
        ("1/2", "0.5"),
        (".5", "0.50"),
        ("2e3", "2000"),
        ("It costs 3 coins, so 18.", "18"),
        ("from 10-5", "5"),
        ("50 %", "50%"),
        ("0.1", "1/10"),
        ("007", "7"),
    ],
)
def test_numbers_are_equal_however_they_are_written(completion, reference):
    assert answer_checks.numeric(completion, reference) == 1
    assert answer_checks.numeric(reference, completion) == 1


@pytest.mark.parametrize(
    ("completion", "reference"),
    [("5", "-5"), ("12", "1.2"), ("0.3333", "1/3"), ("1,2", "12"), ("none", "0"), ("", "0"), ("1/0", "0"), ("3", "x")],
)
def test_other_numbers_and_no_numbers_earn_nothing(completion, reference):
    assert answer_checks.numeric(completion, reference) == 0


def test_the_pattern_says_where_the_number_is():
    reference = "Half of 48 is 24 clips.\n48 + 24 = 72\n#### 72"
    assert answer_checks.numeric("So #### 70, no: #### 72.00 it is, of 100", reference, pattern=GSM8K) == 1
    assert answer_checks.numeric("The answer is 72", reference, pattern=GSM8K) == 0
    assert answer_checks.numeric("#### many", reference, pattern=GSM8K) == 0


def test_numbers_written_in_many_ways_at_random_are_told_apart():
    dice = random.Random(5)
    for _ in range(500):
        value, other = (round(dice.uniform(-1e7, 1e7), dice.randrange(4)) for _ in range(2))
        written = dice.choice([f"{value}", f"{value:,}", f"${value:,.4f}", f"about {value:.5f}."])
        assert answer_checks.numeric(written, str(value)) == 1
        assert answer_checks.numeric(written, str(other)) == float(value == other)


def test_a_number_without_end_is_no_number():
    assert answer_checks.numeric("9" * 10_000, "9" * 10_000) == 0
    assert answer_checks.numeric("1e999", "1e999") == 1


def test_valid_json_is_one_object_or_array():
    assert [answer_checks.json_valid(text, ANSWER) for text in (ANSWER, "[1]", " {} ")] == [1, 1, 1]
    assert [answer_checks.json_valid(text, ANSWER) for text in ("3", '"a"', "null", ANSWER[:-1], ANSWER * 2, "")] == [
        0
    ] * 6


def test_brackets_without_end_are_no_json():
    assert answer_checks.json_valid("[" * 100_000, ANSWER) == 0
    assert answer_checks.json_fields('{"a":' * 100_000, ANSWER) == 0


def test_json_fields_are_the_f1_of_right_fields():
    assert answer_checks.json_fields(ANSWER, ANSWER) == 1
    assert answer_checks.json_fields(ANSWER.replace("attic", "cellar"), ANSWER) == 3 / 4
    assert answer_checks.json_fields('{"action":"set"}', ANSWER) == 2 * 1 / (1 + 4)
    assert answer_checks.json_fields(ANSWER.replace("}", ',"time":"9:30"}'), ANSWER) == 2 * 4 / (5 + 4)
    assert answer_checks.json_fields('{"value":40,"room":"attic","device":"lamp","action":"set"}', ANSWER) == 1
    assert answer_checks.json_fields('{"error":"impossible"}', ANSWER) == 0


def test_json_fields_look_into_objects_and_arrays():
    assert answer_checks.json_fields('{"a":{"b":1,"c":2}}', '{"a":{"b":1,"c":3}}') == 1 / 2
    assert answer_checks.json_fields("[1,2,3]", "[1,3,2]") == 1 / 3
    assert answer_checks.json_fields('{"a":[]}', '{"a":[]}') == 1
    assert answer_checks.json_fields('{"a":[]}', '{"a":{}}') == 0
    assert answer_checks.json_fields("{}", "{}") == 1


def test_json_fields_tell_types_apart_but_not_ways_to_write_a_number():
    assert answer_checks.json_fields('{"a":1.0}', '{"a":1}') == 1
    for other in ('{"a":true}', '{"a":"1"}', '{"a":null}', '[["a",1]]', '"a"', "a"):
        assert answer_checks.json_fields(other, '{"a":1}') == 0
        assert answer_checks.json_fields('{"a":1}', other) == 0


def test_a_regular_expression_is_found_anywhere_unless_it_says_otherwise():
    assert answer_checks.regex("so: 42!", "", pattern=r"\d+") == 1
    assert answer_checks.regex("so: 42!", "", pattern=r"\A\d+\Z") == 0
    assert answer_checks.regex("none", "", pattern=r"\d+") == 0


def test_length_falls_off_outside_its_window():
    def earned(count: int) -> float:
        return answer_checks.length("x" * count, "", min_characters=10, max_characters=20)

    assert [earned(count) for count in (10, 15, 20)] == [1, 1, 1]
    assert [earned(count) for count in (0, 5, 25, 30, 40, 1000)] == pytest.approx([0, 0.5, 0.75, 0.5, 0, 0])
    assert answer_checks.length("", "", max_characters=20) == 1


def test_every_reward_is_a_number_from_0_to_1_for_any_text():
    dice = random.Random(3)
    options = {"regex": {"pattern": "a+"}, "length": {"min_characters": 3, "max_characters": 9}}
    texts = ["".join(dice.choices('{}[]":,0123456789.-+/e$ a\n', k=dice.randrange(30))) for _ in range(400)]
    for name, reward in answer_checks.REWARDS.items():
        for completion, reference in zip(texts, reversed(texts), strict=True):
            earned = reward(completion, reference, **options.get(name, {}))
            assert isinstance(earned, float)
            assert math.isfinite(earned)
            assert 0 <= earned <= 1


def test_every_reward_that_can_be_asked_for_is_known():
    from typing import get_args

    from lathe.config.training_params import Reward
    from lathe.training.weighted_rewards import CALL_REWARDS

    names = {*answer_checks.REWARDS, *CALL_REWARDS, "function"}
    assert set(get_args(Reward.model_fields["name"].annotation)) == names
