"""What preprocess says of the rows, and where it stops."""

import json
import random
from itertools import pairwise

import numpy
import pytest
from byte_chat import FRAME, Bench, byte_chat, chat
from refusals import refused
from row_faults import check_fault

from lathe.data.near_duplicates import NGRAM_WORDS, NGramIndex, find_near_duplicates, hash_ngrams, hash_words
from lathe.data.read_files import Fault
from lathe.data.writing_systems import detect_writing_system

WORDS = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "klmnp"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_chat()


@pytest.fixture
def bench(tmp_path, tokenizer):
    return Bench(tmp_path, tokenizer)


def sentence(seed, words=20):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def put_others(bench):
    bench.put("validation.jsonl", [chat("v", "w")])
    bench.put("test.jsonl", [chat("x", "y")])


def contents(row):
    return [message["content"] for message in row["messages"]]


# Rows that are too long.


def test_a_row_over_max_length_is_dropped_unless_asked_otherwise(bench):
    bench.put("train.jsonl", [chat("q" * 100, "a"), chat("q", "a")])
    put_others(bench)
    outcome = bench.run(max_length=50)
    assert outcome.of("train")["dropped"] == {"too_long": 1}
    assert outcome.of("train")["truncated"] == {
        "rows": 0,
        "side": None,
        "tokens": 0,
        "supervised_tokens": 0,
    }


def test_truncate_prompt_takes_the_middle_of_a_single_request_and_never_the_answer(bench):
    bench.put("train.jsonl", [chat("b" * 60 + "m" * 60 + "e" * 60, "the answer", system="Be brief.")])
    put_others(bench)
    outcome = bench.run(max_length=120, too_long="truncate_prompt")
    (row,) = outcome.splits["train"]
    system, request, answer = contents(row)
    assert (system, answer) == ("Be brief.", "the answer")
    assert set(request) == {"b", "e"}
    assert 0 <= request.count("b") - request.count("e") <= 1
    tokens = outcome.of("train")["tokens"]["total"]["max"]
    assert tokens == 120, "no more is cut than must be"
    truncated = outcome.of("train")["truncated"]
    assert truncated == {"rows": 1, "side": "prompt", "tokens": 180 - len(request), "supervised_tokens": 0}


def test_truncate_prompt_takes_earlier_turns_whole_and_leaves_the_others_as_they_were(bench):
    bench.put("train.jsonl", [chat("one", "1", "two", "2", "three", "3", system="Count.")])
    put_others(bench)
    whole = bench.run().of("train")["tokens"]["total"]["max"]
    outcome = bench.run(max_length=whole - 1, too_long="truncate_prompt")
    assert contents(outcome.splits["train"][0]) == ["Count.", "two", "2", "three", "3"]
    assert outcome.of("train")["truncated"]["supervised_tokens"] == 2  # "1" and its end token
    outcome = bench.run(max_length=58, too_long="truncate_prompt")
    assert contents(outcome.splits["train"][0]) == ["Count.", "three", "3"]


def test_truncate_answer_takes_later_turns_and_the_end_of_the_answer(bench):
    bench.put("train.jsonl", [chat("one", "1" * 30, "two", "2" * 30)])
    put_others(bench)
    for max_length, expected in [
        (FRAME + 33, ["one", "1" * 30]),
        (FRAME + 32, ["one", "1" * 29]),
        (FRAME + 4, ["one", "1"]),
        (2 * FRAME + 1 + 66 - 2, ["one", "1" * 30, "two", "2" * 28]),
    ]:
        outcome = bench.run(max_length=max_length, too_long="truncate_answer")
        assert contents(outcome.splits["train"][0]) == expected, max_length
        assert outcome.of("train")["truncated"]["side"] == "answer"


def test_a_row_that_cannot_be_made_to_fit_is_dropped_with_both_numbers(bench):
    bench.put("train.jsonl", [chat("q" * 20, "a" * 100), chat("q", "a")])
    put_others(bench)
    outcome = bench.run(max_length=60, too_long="truncate_prompt")
    (example,) = outcome.examples("train")["dropped"]["too_long"]
    check_fault(Fault("too_long", example["field"], example["problem"]), "too_long", None)
    assert "140 tokens long (39 prompt, 101 answer)" in example["problem"]
    assert "training.max_length 60" in example["problem"]
    outcome = bench.run(max_length=30, too_long="truncate_answer")
    assert outcome.of("train")["dropped"] == {"too_long": 1}


@pytest.mark.parametrize("too_long", ["truncate_prompt", "truncate_answer"])
def test_every_cut_row_fits_and_is_whole_but_for_the_side_that_was_asked_for(bench, too_long):
    generator = random.Random(3)
    alphabet = "ab é日🍎\n"
    rows = []
    for number in range(60):
        texts = ["".join(generator.choices(alphabet, k=generator.randint(5, 90))).strip() or "x" for _ in range(4)]
        rows.append(chat(f"{number} {texts[0]}", *texts[1:]))
    bench.put("train.jsonl", rows)
    put_others(bench)
    outcome = bench.run(max_length=150, too_long=too_long)
    train = outcome.of("train")
    assert train["truncated"]["rows"] > 10
    assert train["tokens"]["total"]["max"] <= 150
    given = {text for row in rows for text in contents(row)}
    for row in outcome.splits["train"]:
        *earlier, request, answer = contents(row)
        kept = [*earlier, answer] if too_long == "truncate_prompt" else [*earlier, request]
        assert set(kept) <= given
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)


def test_too_many_cut_rows_stop_the_stage_with_numbers_and_remedy(bench):
    bench.put("train.jsonl", [chat("q" * 100, "a"), chat("q", "a")])
    put_others(bench)
    limit = "preprocess.max_truncated_fraction 0.2"
    with refused("too-many-truncated", "train.jsonl:1: was 121 tokens long and is 50; ", "1 of 4 rows", limit):
        bench.run(max_length=50, too_long="truncate_prompt", max_truncated_fraction=0.2)
    bench.run(max_length=50, too_long="truncate_prompt", max_truncated_fraction=0.25)


# Rows of one split that are in another.


def put_overlapping(bench, *, changed_words):
    """Write twenty test rows of which half are train rows with so many words changed at their end."""
    train = [chat(sentence(n), sentence(1000 + n)) for n in range(40)]
    test = [chat(sentence(2000 + n), sentence(3000 + n)) for n in range(10)]
    for n in range(10):
        request = sentence(n).split()
        request[len(request) - changed_words :] = sentence(4000 + n, changed_words).split()
        test.append(chat(" ".join(request), sentence(1000 + n)))
    bench.put("train.jsonl", train)
    bench.put("validation.jsonl", [chat(sentence(5000), sentence(5001))])
    bench.put("test.jsonl", test)


def test_rows_that_are_nearly_in_train_are_counted_with_where_they_are(bench):
    put_overlapping(bench, changed_words=1)
    overlap = bench.run().near("test_in_train")
    assert (overlap["rows"], overlap["checked"], overlap["share"]) == (10, 20, 0.5)
    for example in overlap["examples"]:
        number = int(example["at"].partition(":")[2])
        assert example["problem"] == (
            f"25 of its 33 word sequences are in train, most of them in train.jsonl:{number - 10}"
        )
    assert bench.run().near("validation_in_train")["rows"] == 0


def test_rows_that_share_few_word_sequences_are_not_near(bench):
    put_overlapping(bench, changed_words=12)
    assert bench.run().near("test_in_train")["rows"] == 0


def test_an_exact_prompt_is_removed_from_train_and_not_counted_as_near(bench):
    put_overlapping(bench, changed_words=0)
    outcome = bench.run()
    assert outcome.report["overlap"] == [{"splits": "train_in_test", "rows": 10}]
    assert outcome.near("test_in_train")["rows"] == 0


def test_case_punctuation_and_the_system_message_do_not_hide_an_overlap(bench):
    text, answer = sentence(1), sentence(2)
    bench.put("train.jsonl", [chat(text, answer)])
    bench.put("validation.jsonl", [chat(sentence(3), sentence(4), system=text)])
    bench.put("test.jsonl", [chat(text.upper().replace(" ", ", ") + "!", answer, system="Be brief.")])
    outcome = bench.run()
    assert outcome.near("test_in_train")["rows"] == outcome.report["rows"]["nearly_in_another_split"] == 1
    assert outcome.near("validation_in_train")["rows"] == 0


def test_too_many_rows_nearly_in_another_split_stop_the_stage_with_numbers_and_remedy(bench):
    put_overlapping(bench, changed_words=1)
    with refused("too-much-overlap", "10 of 20 test rows", "preprocess.max_overlap_fraction 0.4") as caught:
        bench.run(max_overlap_fraction=0.4)
    assert str(caught.value).startswith("test.jsonl:")
    bench.run(max_overlap_fraction=0.5)


def test_a_row_too_long_for_train_is_nobodys_source(bench):
    put_overlapping(bench, changed_words=1)
    longest = bench.run().of("train")["tokens"]["total"]["max"]
    bench.put(
        "train.jsonl",
        [chat(sentence(n), sentence(1000 + n), sentence(n) * 9, "z") for n in range(40)] + [chat("k", "k")],
    )
    assert bench.run(max_length=longest + 20).near("test_in_train")["rows"] == 0


def test_shares_of_sequences_are_those_counted_one_by_one():
    generator = random.Random(5)
    held_out = [" ".join(generator.choices("abcd", k=generator.randint(0, 30))) for _ in range(50)]
    train = [" ".join(generator.choices("abcd", k=generator.randint(0, 400))) for _ in range(50)]

    def parts(text):
        split = text.split()
        return [tuple(split[n : n + NGRAM_WORDS]) for n in range(max(1, len(split) - NGRAM_WORDS + 1))] if split else []

    known = {part for text in train for part in parts(text)}
    expected = {n for n, text in enumerate(held_out) if parts(text) and
                sum(part in known for part in parts(text)) >= 0.7 * len(parts(text))}  # fmt: skip
    ngrams = hash_ngrams([hash_words(text) for text in held_out])
    assert ngrams.counts.tolist() == [len(parts(text)) for text in held_out]
    index = NGramIndex.build(ngrams)
    for start in range(0, 50, 7):
        batch = hash_ngrams([hash_words(text) for text in train[start : start + 7]])
        index.mark_seen(batch, numpy.arange(start, min(start + 7, 50)))
    count, examples = find_near_duplicates(ngrams, index, 50)
    assert 0 < count < 50
    assert {example.row for example in examples} == expected


def test_writing_without_spaces_is_compared_character_by_character():
    assert len(hash_words("日本語のテキスト")) == 8
    assert hash_words("Straße, ÜBER!") == hash_words("straße über")
    assert hash_words("plain_text 12") == hash_words("PLAIN_TEXT – 12")


# What else the report tells.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Four apples", "Latin"),
        ("Сколько стоит apple?", "Cyrillic"),
        ("日本語のテキスト", "Kana"),
        ("价格是多少", "Han"),
        ("μέτρο", "Greek"),
        ("12 + 30 = 42", "none"),
        ("🍎 → 🍏", "none"),
    ],
)
def test_the_script_is_that_of_most_letters(text, expected):
    assert detect_writing_system(text) == expected


def test_rows_in_another_script_and_of_unusual_length_are_shown_with_their_place(bench):
    rows = [chat(f"question {n:02}", "answer") for n in range(30)]
    rows[4] = chat("вопрос без ответа", "нет")
    rows[9] = chat("q" * 300, "a")
    rows[17] = chat("q", "a")
    bench.put("train.jsonl", rows)
    put_others(bench)
    outcome = bench.run()
    train, examples = outcome.of("train"), outcome.examples("train")
    assert train["scripts"] == {"Latin": 29, "Cyrillic": 1}
    assert examples["other_scripts"] == {"Cyrillic": ["train.jsonl:5"]}
    usual = FRAME - 1 + len("question 00answer") + 1
    assert train["length_outliers"] == {"above_tokens": usual, "rows": 2}
    assert examples["longest"][0] == {"at": "train.jsonl:10", "tokens": 321}
    assert examples["shortest"][0] == {"at": "train.jsonl:18", "tokens": 22}


def test_the_tables_of_the_plots_hold_every_row(bench):
    bench.put("train.jsonl", [*(chat(f"question {n}", "answer" * n) for n in range(1, 90)), chat("q", ""), chat("q")])
    outcome = bench.run(max_length=500)
    fates = {(row["split"], row["fate"]): row["rows"] for row in outcome.tables["rows"]}
    assert fates["train", "empty_answer"] == fates["train", "no_answer"] == 1
    assert sum(fates.values()) == outcome.report["rows"]["read"] == 91
    for split, rows in outcome.splits.items():
        for part in ("prompt", "answer", "total"):
            bars = [row for row in outcome.tables["lengths"] if (row["split"], row["part"]) == (split, part)]
            assert sum(bar["rows"] for bar in bars) == len(rows)
            widths = {after["tokens"] - bar["tokens"] for bar, after in pairwise(bars)}
            assert len(widths) <= 1


@pytest.mark.heavy
def test_the_report_is_the_same_whatever_the_number_of_processes(bench):
    rows = [chat(sentence(n, n % 60 + 1), sentence(-n, 5)) for n in range(300)]
    bench.put("train.jsonl", [*rows, *rows[:20], {"messages": None}])
    single = bench.run(max_length=300, too_long="truncate_prompt", processes=1)
    for processes in (2, 3, 7):
        other = bench.run(max_length=300, too_long="truncate_prompt", processes=processes)
        assert other.files == single.files
        assert json.dumps(other.report) == json.dumps(single.report)
        assert other.tables == single.tables
