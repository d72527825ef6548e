"""Mixtures: several datasets in one training, with exact shares, one account, and splits that do not overlap."""

from pathlib import Path
from typing import Any

import pytest
from byte_chat import LENIENT, byte_chat
from refusals import refused

from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.config.presets import MixtureDataset
from lathe.data.mixture import choose_counts
from lathe.data.prepare import prepare
from lathe.sources.fetch import fetch_dataset

KEYS: dict[str, Any] = {"source": "local", "path": "data/local/x"}


def rows(name: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {number}", "completion": f"answer {number}"} for number in range(start, start + count)]


def mixture(**parts: Any) -> MixtureDataset:
    return MixtureDataset.model_validate(
        {"source": "mixture", "datasets": {name: {**KEYS, **keys} for name, keys in parts.items()}}
    )


def mix(folder: Path, preset: MixtureDataset, seed: int = 1) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    out = folder / f"out{seed}"
    out.mkdir()
    prepared = prepare(folder / "raw", preset, out, tokenizer=byte_chat(), seed=seed, max_length=400, settings=LENIENT)
    return {name: read_jsonl(out / f"{name}.jsonl") for name in ("train", "validation", "test")}, prepared.report


def put(folder: Path, name: str, content: list[dict[str, Any]], file: str = "train.jsonl") -> None:
    (folder / "raw" / name).mkdir(parents=True, exist_ok=True)
    write_jsonl(content, folder / "raw" / name / file)


def count(split: list[dict[str, Any]]) -> dict[str, int]:
    names = [row["dataset"] for row in split]
    return {name: names.count(name) for name in sorted(set(names))}


def test_weights_give_exact_shares_and_each_dataset_its_own_held_out_rows(tmp_path):
    put(tmp_path, "one", rows("one", 950))
    put(tmp_path, "two", rows("two", 300))
    splits, report = mix(tmp_path, mixture(one={"weight": 0.95}, two={"weight": 0.05, "split": "train"}))
    assert count(splits["train"]) == {"one": 760, "two": 40}  # 760 are left of one; 5 % beside them are 40
    assert count(splits["validation"]) == count(splits["test"]) == {"one": 95}
    one, two = report["datasets"]
    assert one == {
        "dataset": "one",
        "read": 950,
        "train": 760,
        "validation": 95,
        "test": 95,
        "dropped": 0,
        "share_of_train": 0.95,
    }
    assert (two["read"], two["train"], two["dropped"], two["share_of_train"]) == (300, 40, 260, 0.05)
    [train] = [split for split in report["splits"] if split["split"] == "train"]
    assert train["dropped"] == {"over_limit": 260}
    assert report["rows"]["read"] == report["rows"]["kept"] + report["rows"]["dropped"] == 1250
    # They are mixed: in no tenth of the rows is there only one of them.
    assert all("two" in count(splits["train"][start : start + 200]) for start in range(0, 800, 200))


def test_the_mixture_is_the_same_whatever_the_order_of_the_rows_and_another_with_another_seed(tmp_path):
    put(tmp_path, "one", rows("one", 300))
    put(tmp_path, "two", rows("two", 300))
    preset = mixture(one={"weight": 3.0}, two={"weight": 1.0})
    first, _ = mix(tmp_path, preset)
    put(tmp_path, "two", rows("two", 300)[::-1])
    (tmp_path / "out1").rename(tmp_path / "before")
    assert mix(tmp_path, preset)[0] == first
    assert mix(tmp_path, preset, seed=2)[0]["train"] != first["train"]


def test_a_number_of_rows_or_all_of_them(tmp_path):
    put(tmp_path, "one", rows("one", 100))
    put(tmp_path, "two", rows("two", 100))
    put(tmp_path, "three", rows("three", 100), "test.jsonl")
    splits, _ = mix(tmp_path, mixture(one={}, two={"rows": 7, "split": "train"}, three={"split": "test"}))
    assert count(splits["train"]) == {"one": 80, "two": 7}
    assert count(splits["test"]) == {"one": 10, "three": 100}


def test_what_two_datasets_share_is_removed_from_training_and_counted(tmp_path):
    put(tmp_path, "one", rows("both", 50))
    put(tmp_path, "one", rows("held out", 10), "test.jsonl")
    put(tmp_path, "two", [*rows("both", 20), *rows("held out", 10), *rows("two", 30)])
    splits, report = mix(tmp_path, mixture(one={}, two={"split": "train"}))
    prompts = [row["messages"][0]["content"] for name in splits for row in splits[name]]
    assert len(prompts) == len(set(prompts))
    held_out = {row["messages"][0]["content"] for name in ("validation", "test") for row in splits[name]}
    assert {f"held out {number}" for number in range(10)} <= held_out
    assert {"splits": "train_in_test", "rows": 10} in report["overlap"]
    [train] = [split for split in report["splits"] if split["split"] == "train"]
    assert train["dropped"]["duplicate"] + train["dropped"]["in_other_split"] >= 30
    dropped = next(entry for entry in report["examples"] if entry["split"] == "train")["dropped"]
    assert all(case["at"].startswith(("one/", "two/")) for cases in dropped.values() for case in cases)


def test_each_dataset_is_read_in_its_own_way_and_texts_go_beside_chats(tmp_path):
    put(tmp_path, "one", [{"q": row["prompt"], "a": row["completion"]} for row in rows("one", 40)])
    put(tmp_path, "two", [{"text": f"A document with the number {number}."} for number in range(40)])
    keys = {"prompt": "q", "completion": "a", "system_prompt": "Be brief."}
    splits, report = mix(tmp_path, mixture(one=keys, two={"format": "text", "split": "train"}))
    roles = {row["dataset"]: [message["role"] for message in row["messages"]] for row in splits["train"]}
    assert roles == {"one": ["system", "user", "assistant"], "two": ["document"]}
    assert [columns["format"] for columns in report["columns"]] == ["prompt_completion", "text"]
    assert {row["dataset"] for row in splits["validation"]} == {"one"}


def test_a_dataset_of_which_no_training_row_is_left_is_refused(tmp_path):
    put(tmp_path, "one", rows("one", 40))
    put(tmp_path, "two", rows("one", 40))
    with refused("empty-split", "the dataset two of the mixture"):
        mix(tmp_path, mixture(one={}, two={"split": "train"}))


@pytest.mark.parametrize(
    ("available", "weights", "counts"),
    [
        ({"a": 100, "b": 100}, {"a": 1.0, "b": 1.0}, {"a": 100, "b": 100}),
        ({"a": 100, "b": 10}, {"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}),
        ({"a": 1000, "b": 1000}, {"a": 0.9, "b": 0.1}, {"a": 1000, "b": 111}),
        ({"a": 5, "b": 1000, "c": 0}, {"a": 0.001, "b": 1.0, "c": None}, {"a": 1, "b": 1000, "c": 0}),
    ],
)
def test_weights_are_shares_of_as_many_rows_as_there_can_be(available, weights, counts):
    parts = {name: {"weight": weight} if weight else {"split": "test"} for name, weight in weights.items()}
    assert choose_counts(available, mixture(**parts).datasets) == counts


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": {"weight": 1.0}, "b": {}}, "some datasets have a weight and others none"),
        ({"a": {"weight": 1.0, "rows": 3}, "b": {"rows": 2}}, "a has weight and rows"),
        ({"a": {"split": "test", "rows": 3}, "b": {}}, "a has no training rows to choose"),
        ({"a": {"split": "test"}, "b": {"split": "validation"}}, "no dataset gives training rows"),
        ({"a.b": {}, "c": {}}, "'a.b' names a dataset of the mixture"),
        ({"a": {}}, "at least 2"),
    ],
)
def test_a_mixture_that_says_two_things_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        mixture(**parts)


def test_the_origin_of_each_dataset_is_known(tmp_path):
    preset = MixtureDataset.model_validate(
        {"source": "mixture", "datasets": {"one": {"source": "builtin"}, "two": {"source": "builtin", "errors": False}}}
    )
    origin = fetch_dataset(preset, tmp_path, seed=1)
    assert [part["name"] for part in origin["datasets"]] == ["one", "two"]
    digests = [part["sha256"] for part in origin["datasets"]]
    assert all(len(digest) == 64 for digest in digests)
    assert digests[0] != digests[1]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["one", "two"]
