"""Regular expressions of the user: one that would take for ever is refused, or ended."""

import re
import threading
import time

import pytest
from toy import toy_text

from lathe.common.bounded_regex import is_slow, limit_matching
from lathe.common.errors import InputError
from lathe.config.load import load
from lathe.evaluation import answer_checks, text_metrics
from lathe.gguf.tensor_types import assign_types
from lathe.models.merge.read_adapter import _match_pattern

SLOW = r"(a+)+$"
# The trial on forty signs does not show it; the answer of a model that repeats itself does.
SLOW_ON_LONG_TEXTS = r"(?:a|b|ab)*?(?:a|b|ab)*?(?:a|b|ab)*?c"


@pytest.mark.parametrize("pattern", [SLOW, r"^(\w+\s?)*$", r"(-?\d+)+#", r"(x|x)*y"])
def test_an_expression_with_many_ways_to_match_is_slow(pattern):
    assert is_slow(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"#### (\S+)",
        r"<answer>(.*?)</answer>",
        r".*\.(q|v)_proj",
        r"model\.layers\.(1[0-9]|2[0-9])\..*proj",
        r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}",
        r"(-?\d+(?:\.\d+)?)",
        "attn_v",
    ],
)
def test_expressions_that_people_write_are_not(pattern):
    assert not is_slow(pattern)


@pytest.mark.parametrize(
    ("line", "changed", "where"),
    [
        ("answer_pattern: #", f"answer_pattern: '({SLOW})' #", "evaluate.answer_pattern"),
        ("target_modules: all-linear #", f"target_modules: '{SLOW}' #", "lora.target_modules"),
        ("tensor_types: #", f"tensor_types: ['{SLOW}=Q8_0'] #", "quantize.tensor_types"),
        (
            "  - name: json_fields\n    weight: 0.5\n",
            f"  - {{name: regex, weight: 0.5, pattern: '{SLOW}'}}\n",
            "grpo.rewards",
        ),
    ],
)
def test_an_expression_that_takes_for_ever_is_refused_with_the_parameters(tmp_path, line, changed, where):
    assert toy_text().count(line) == 1
    file = tmp_path / "params.yaml"
    file.write_text(toy_text().replace(line, changed))
    started = time.monotonic()
    with pytest.raises(InputError, match=re.escape(where)) as caught:
        load(file)
    assert "takes for ever on some" in str(caught.value)
    assert "write it without repetitions inside of repetitions" in str(caught.value)
    assert time.monotonic() - started < 30


@pytest.fixture
def _half_a_second(monkeypatch):
    monkeypatch.setattr(limit_matching.__wrapped__, "__defaults__", (0.5,))


@pytest.mark.usefixtures("_half_a_second")
def test_a_match_that_does_not_end_is_ended():
    text, tensors = "ab" * 3000, ["blk.0." + "a" * 60 + "!"]
    for match, where in (
        (lambda: answer_checks.regex(text, "", pattern=SLOW_ON_LONG_TEXTS), "grpo.rewards"),
        (lambda: answer_checks.numeric(text, "", pattern=f"({SLOW_ON_LONG_TEXTS})"), "grpo.rewards"),
        (
            lambda: text_metrics.exact_match(text, "c", answer_pattern=f"({SLOW_ON_LONG_TEXTS})"),
            "evaluate.answer_pattern",
        ),
    ):
        with pytest.raises(InputError, match=where) as caught:
            match()
        assert "has not come to an end after 0.5 s on one text" in str(caught.value)
    is_slow.cache_clear()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=r"quantize\.tensor_types"):
        patch.setattr("lathe.common.bounded_regex.is_slow", lambda pattern: False)
        assign_types([f"{SLOW}=Q8_0"], tensors)


@pytest.mark.usefixtures("_half_a_second")
def test_a_pattern_of_an_adapter_that_does_not_end_is_refused():
    with pytest.raises(InputError, match="rank_pattern"):
        _match_pattern({SLOW: 8}, "a" * 60 + "!", 16)
    with pytest.raises(InputError, match="is not a regular expression"):
        _match_pattern({"(": 8}, "layer", 16)
    assert _match_pattern({"q_proj": 8}, "model.layers.0.q_proj", 16) == 8


def test_a_limit_leaves_no_timer_and_other_threads_have_none():
    import signal

    before = signal.getsignal(signal.SIGVTALRM)
    with limit_matching("key", "a+"):
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    assert signal.getsignal(signal.SIGVTALRM) is before
    found: list[bool] = []

    def match() -> None:
        with limit_matching("key", "a+"):
            found.append(re.match("a+", "aaa") is not None)

    thread = threading.Thread(target=match)
    thread.start()
    thread.join()
    assert found == [True]
