"""Gates: parsed, checked against what a run has, and evaluated on a report."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.config.gates import check_names, parse_gate
from lathe.evaluation.gate_results import evaluate_gate, format_outcome, make_metrics

TYPES = ["Q8_0", "Q4_K_M"]
SCORES = ["exact_match", "rouge_l", "perplexity", "kl", "general_perplexity", "bytes"]
REPORT = {
    "base": {"exact_match": 0.1, "perplexity": 9.5, "bytes": 3_000_000, "rouge_l": None},
    "base_few_shot": {"exact_match": 0.3},
    "merged": {"exact_match": 0.93, "perplexity": 1.5, "bytes": 3_000_100, "rouge_l": 0.95},
    "Q8_0": {"exact_match": 0.92, "perplexity": 1.5, "kl": 0.001, "bytes": 1_600_000, "rouge_l": 0.9},
    "Q4_K_M": {"exact_match": 0.9, "perplexity": 1.6, "kl": 0.02, "bytes": 900_000, "rouge_l": float("nan")},
}


def evaluated(expression):
    return evaluate_gate(parse_gate(expression), REPORT, TYPES)


@pytest.mark.parametrize(
    ("expression", "passed", "margin"),
    [
        ("merged.exact_match > base.exact_match", True, 0.83),
        ("base.exact_match > merged.exact_match", False, -0.83),
        ("merged.exact_match>0.9", True, 0.03),
        # 0.93 - 0.03 is 0.9 here, though not among binary fractions.
        ("Q4_K_M.exact_match >= merged.exact_match - 0.03", True, 0.0),
        ("Q4_K_M.exact_match > merged.exact_match - 0.03", False, 0.0),
        ("Q4_K_M.exact_match == 0.9", True, 0.0),
        ("Q4_K_M.exact_match == merged.exact_match", False, -0.03),
        ("Q4_K_M.bytes <= 0.5 * merged.bytes", True, 600_050.0),
        ("Q4_K_M.bytes < .25*merged.bytes + 1e3", False, -148_975.0),
        ("-0.5 * base.perplexity + 6 >= Q4_K_M.perplexity - merged.perplexity", True, 1.15),
        ("Q8_0.kl < 2e-3", True, 0.001),
        ("merged.exact_match - base_few_shot.exact_match >= 0.5", True, 0.13),
    ],
)
def test_a_gate_compares_two_sums_exactly(expression, passed, margin):
    outcome = evaluated(expression)
    assert (outcome.passed, float(outcome.margin)) == (passed, margin)


@pytest.mark.parametrize(
    ("expression", "artifact", "passed", "margin"),
    [
        ("quantized.exact_match >= merged.exact_match - 0.03", "Q4_K_M", True, 0.0),
        ("quantized.exact_match >= 0.91", "Q4_K_M", False, -0.01),
        ("quantized.kl < 0.1", "Q4_K_M", True, 0.08),
        ("quantized.bytes > 1000000 ", "Q4_K_M", False, -100_000.0),
        ("2 * quantized.kl + quantized.exact_match < 0.93", "Q4_K_M", False, -0.01),
        ("quantized.kl > 0.01", "Q8_0", False, -0.009),
    ],
)
def test_quantized_stands_for_every_type_and_tells_of_the_worst(expression, artifact, passed, margin):
    outcome = evaluated(expression)
    assert (outcome.artifact, outcome.passed, float(outcome.margin)) == (artifact, passed, margin)


@pytest.mark.parametrize(
    "expression", ["base.rouge_l < 0.5", "Q4_K_M.rouge_l >= 0", "0 == 0 * base.rouge_l", "quantized.rouge_l > 0.5"]
)
def test_a_score_that_is_missing_or_no_number_fails_without_a_margin(expression):
    outcome = evaluated(expression)
    assert not outcome.passed
    assert outcome.margin is None
    assert "a score is missing" in format_outcome(outcome)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "it has 0 of <, <=, >, >=, ==; must have one"),
        ("merged.exact_match", "it has 0 of"),
        ("0.1 < merged.exact_match < 0.9", "it has 2 of"),
        ("merged.exact_match >", "a number or a score is missing at an end"),
        ("> 0.5", "a number or a score is missing at an end"),
        ("merged.exact_match >= 0.9 -", "a number or a score is missing at an end"),
        ("merged.exact_match >= * 2", "a number or a score is missing before '*'"),
        ("merged.exact_match * 2 > 1", "a + or - is missing before '*'"),
        ("2 merged.exact_match > 1", "a + or - is missing before 'merged.exact_match'"),
        ("merged.exact_match >= 2 * 3", "a + or - is missing before '*'"),
        ("merged.exact_match => 0.5", "cannot read '=> 0.5'"),
        ("merged.exact_match = 0.5", "cannot read '= 0.5'"),
        ("merged.exact_match != 0.5", "cannot read '!= 0.5'"),
        ("merged.a.b.c > 0.5", "cannot read 'merged.a.b.c > 0.5'"),
        ("merged > 0.5", "cannot read 'merged > 0.5'"),
        ("__import__('os').system('x') > 1", "cannot read \"__import__('os')"),
        ("merged.exact_match > 0.5x", "cannot read '0.5x'"),
        ("merged.exact_match > 1e999", "cannot read '1e999'"),
        ("merged.exact_match > (0.5)", "cannot read '(0.5)'"),
        ("1 < 2", "it names no score"),
        ("мerged.exact_match > 1", "cannot read"),
    ],
)
def test_what_is_no_comparison_is_refused_with_an_example(expression, problem):
    with pytest.raises(ValueError, match="is not a comparison of scores") as caught:
        parse_gate(expression)
    assert problem in str(caught.value)
    assert "write sums of numbers, ARTIFACT.SCORE and NUMBER * ARTIFACT.SCORE on both sides, such as" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60) | st.text(alphabet="ab.0 1+-*<>=e", max_size=30))
def test_any_text_is_read_or_refused(expression):
    try:
        gate = parse_gate(expression)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
        assert gate.scores
    assert refusal is None or "is not a comparison of scores" in refusal


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("Q4_K_S.exact_match > 0", "names Q4_K_S, which is no artifact; did you mean 'Q4_K_M'?"),
        ("quantised.exact_match > 0", "names quantised, which is no artifact; did you mean 'quantized'?"),
        ("merged.exact_mach > 0", "names exact_mach, which is not computed; did you mean 'exact_match'?"),
        ("merged.judge > 0", "names judge, which is not computed; set judge.enabled to true"),
        ("merged.combined > 0", "names combined, which is not computed; add bert_score to evaluate.metrics"),
        ("merged.chrf > 0", "names chrf, which is not computed; add it to evaluate.metrics"),
        ("merged.kl < 1", "names merged.kl; only quantized files have a kl"),
        ("base_few_shot.general_perplexity < 1", "general text has no few-shot prompt"),
    ],
)
def test_a_gate_names_what_a_run_has(expression, message):
    with pytest.raises(ValueError, match=r"^'") as caught:
        check_names(parse_gate(expression), types=TYPES, scores=SCORES)
    assert message in str(caught.value)


def test_what_a_run_has_may_be_named():
    for expression in ("quantized.kl < 1", "Q8_0.bytes < base_few_shot.bytes", "merged.general_perplexity < 9"):
        check_names(parse_gate(expression), types=TYPES, scores=SCORES)


def test_outcomes_become_metrics_and_lines():
    outcomes = [evaluated("merged.exact_match > base.exact_match"), evaluated("quantized.exact_match >= 0.91")]
    assert make_metrics(outcomes) == {
        "passed": False,
        "gates": {
            "merged.exact_match > base.exact_match": {"passed": True, "margin": 0.83},
            "quantized.exact_match >= 0.91": {"passed": False, "margin": -0.01},
        },
    }
    assert make_metrics([]) == {"passed": True, "gates": {}}
    assert [format_outcome(outcome) for outcome in outcomes] == [
        "passed  merged.exact_match > base.exact_match  (0.93 > 0.1, margin +0.83)",
        "failed  quantized.exact_match >= 0.91  (0.9 >= 0.91 for Q4_K_M, margin -0.01)",
    ]
