import json
from collections import Counter
from itertools import combinations

import pytest

from lathe.sources.builtin import household_commands

SEEDS = (1, 42)
DOCUMENTS = 4_000


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def rows(seed):
    return household_commands.make_rows(seed)


@pytest.fixture(scope="module")
def documents(seed):
    return household_commands.make_documents(seed, DOCUMENTS)


def test_without_errors_every_command_can_be_carried_out(seed, rows):
    plain = household_commands.make_rows(seed, errors=False)
    assert {split: len(those) for split, those in plain.items()} == {split: len(those) for split, those in rows.items()}
    for kind, allowed in ((rows, True), (plain, False)):
        answers = [row["messages"][-1]["content"] for split in kind.values() for row in split]
        assert any("error" in answer for answer in answers) == allowed


def test_the_same_seed_gives_the_same_rows_and_documents(seed, rows, documents):
    assert household_commands.make_rows(seed) == rows
    assert household_commands.make_documents(seed, DOCUMENTS) == documents


def test_another_seed_gives_other_rows_and_documents(seed, rows, documents):
    assert household_commands.make_rows(seed + 1) != rows
    assert household_commands.make_documents(seed + 1, DOCUMENTS) != documents


def test_the_splits_are_as_large_as_promised(rows):
    assert 2_000 <= len(rows["train"]) <= 2_500
    assert len(rows["validation"]) >= 500
    assert len(rows["test"]) >= 500


def test_a_row_is_one_question_and_one_answer(rows):
    for row in _all(rows):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert _request(row) == _request(row).strip() != ""
        assert "{" not in _request(row), "a slot of the grammar was left open"


def test_no_two_requests_are_the_same_even_without_case_and_punctuation(rows):
    requests = {name: {household_commands.normalize(_request(row)) for row in split} for name, split in rows.items()}
    for name, split in rows.items():
        assert len(requests[name]) == len(split)
    for one, other in combinations(requests.values(), 2):
        assert not one & other


def test_every_answer_is_compact_json_of_the_promised_keys_in_order(rows):
    order = ["action", "device", "room", "value", "delay", "time"]
    for row in _all(rows):
        written = row["messages"][1]["content"]
        answer = json.loads(written)
        assert written == household_commands.encode_answer(answer)
        assert list(answer) == ["error"] or list(answer) == [key for key in order if key in answer]
        assert "error" in answer or list(answer)[:3] == order[:3]


def test_every_answer_is_something_the_device_can_do(rows):
    devices = {device.name: device for device in household_commands.DEVICES}
    for answer in map(_answer, _all(rows)):
        if "error" in answer:
            assert answer["error"] in household_commands.ERRORS
            continue
        device = devices[answer["device"]]
        assert answer["action"] in device.actions
        assert answer["room"] in household_commands.ROOMS
        assert ("value" in answer) == (answer["action"] == "set")
        assert answer.get("value", None) is None or answer["value"] in device.values
        assert not {"delay", "time"} <= answer.keys()
        if "time" in answer:
            hour, minute = answer["time"].split(":")
            assert 0 <= int(hour) < 24
            assert 0 <= int(minute) < 60
            assert len(minute) == 2


def test_every_rejected_answer_has_the_form_of_an_answer_and_is_wrong(rows):
    order = ["action", "device", "room", "value", "delay", "time"]
    for row in _all(rows):
        (message,) = row["rejected"]
        rejected = json.loads(message["content"])
        assert message == {"role": "assistant", "content": household_commands.encode_answer(rejected)}
        assert rejected != _answer(row)
        if "error" in rejected:
            assert rejected["error"] in household_commands.ERRORS
        else:
            assert list(rejected) == [key for key in order if key in rejected]
            assert ("value" in rejected) == (rejected["action"] == "set")


def test_a_rejected_answer_is_wrong_in_one_thing_and_every_thing_goes_wrong(rows):
    wrong = Counter()
    for row in _all(rows):
        right, rejected = _answer(row), json.loads(row["rejected"][0]["content"])
        if "error" in right or "error" in rejected:
            wrong["unnoticed" if "error" not in rejected else "error" if "error" in right else "no error"] += 1
            continue
        (key,) = [key for key in right if right[key] != rejected.get(key) and key != "value"] or ["value"]
        wrong[key] += 1
    assert min(wrong[key] for key in ("action", "device", "room", "value", "delay", "time", "no error")) > 50
    assert min(wrong["unnoticed"], wrong["error"]) > 150


def test_no_rejected_answer_of_training_names_a_pair_that_is_kept_for_the_test(seed, rows):
    known = {(device.name, room) for device, room in household_commands.split_pairs(seed)[0]}
    for row in rows["train"] + rows["validation"]:
        rejected = json.loads(row["rejected"][0]["content"])
        assert "error" in rejected or (rejected["device"], rejected["room"]) in known


def test_the_dataset_is_varied_in_every_split(rows):
    for split in rows.values():
        answers = [_answer(row) for row in split]
        assert len({a["room"] for a in answers if "room" in a}) >= 10
        assert len({a["device"] for a in answers if "device" in a}) >= 8
        assert len({a["action"] for a in answers if "action" in a}) >= 5
        assert len({a["value"] for a in answers if "value" in a}) >= 20
        assert len({a["delay"] for a in answers if "delay" in a}) >= 20
        assert len({a["time"] for a in answers if "time" in a}) >= 80


def test_between_a_tenth_and_a_quarter_of_every_split_are_errors_and_every_error_occurs(rows):
    for split in rows.values():
        errors = [answer["error"] for answer in map(_answer, split) if "error" in answer]
        assert 0.1 <= len(errors) / len(split) <= 0.25
        assert set(errors) == set(household_commands.ERRORS)


def test_the_test_split_has_pairs_of_device_and_room_that_were_never_in_training(rows):
    learnt = _pairs(rows["train"]) | _pairs(rows["validation"])
    unseen = [row for row in rows["test"] if _pairs([row]) - learnt]
    assert len(unseen) == household_commands.TEST_ROWS_OF_UNSEEN_PAIRS
    assert len(_pairs(unseen)) == len(household_commands.DEVICES)


def test_every_word_of_an_unseen_pair_was_learnt_in_other_pairs(rows):
    learnt = _pairs(rows["train"])
    for device, room in _pairs(rows["test"]) - learnt:
        assert len([pair for pair in learnt if pair[0] == device]) >= 8
        assert len([pair for pair in learnt if pair[1] == room]) >= 7


def test_no_training_request_or_document_names_a_pair_that_is_kept_for_the_test(seed, rows, documents):
    _, unseen = household_commands.split_pairs(seed)
    requests = [_request(row) for row in rows["train"] + rows["validation"]]
    targets = [
        f" {household_commands.normalize(form.format(device=device, room=room))} "
        for kept, room_name in unseen
        for device in kept.aliases
        for room in household_commands.ROOMS[room_name]
        for form in household_commands.TARGETS + household_commands.TARGETS_SHORT
    ]
    for text in map(household_commands.normalize, requests + documents):
        assert not any(target in f" {text} " for target in targets), text


def test_no_document_repeats_a_request_or_has_the_form_of_an_answer(rows, documents):
    requests = {household_commands.normalize(_request(row)) for row in _all(rows)}
    answers = {row["messages"][1]["content"] for row in _all(rows)}
    for document in documents:
        asked, _, meaning = document.partition(f" {household_commands.ARROW} ")
        assert "\n" not in document
        assert household_commands.normalize(asked) not in requests
        assert not any(answer in document for answer in ('"action"', '"error"', "<|im_"))
        assert meaning == "" or (meaning.startswith("(") and meaning.endswith(")"))
        assert document not in answers


def test_documents_are_as_many_as_asked_for(documents):
    assert len(documents) == DOCUMENTS


def _all(rows):
    return [row for split in rows.values() for row in split]


def _request(row):
    return row["messages"][0]["content"]


def _answer(row):
    return json.loads(row["messages"][1]["content"])


def _pairs(split):
    return {(answer["device"], answer["room"]) for answer in map(_answer, split) if "device" in answer}
