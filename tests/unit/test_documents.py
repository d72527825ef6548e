"""Documents (format text): raw texts become rows, sequences and packs, and every token is in one of them."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from byte_chat import LENIENT, byte_chat
from refusals import refused

from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.config.held_out_checks import find_misfits
from lathe.config.presets import LocalDataset
from lathe.data.check_file import check_file
from lathe.data.prepare import prepare
from lathe.models.answer_split import split_answer
from lathe.models.document import DOCUMENT
from lathe.models.loss_mask import encode
from lathe.models.tokenizer_template import read_chat_template

TEXTS = [f"Document {number} tells of {'many ' * (number % 7)}things,\nand ends." for number in range(40)]
MAX_LENGTH = 32


def document(text: str) -> dict[str, Any]:
    return {"messages": [{"role": DOCUMENT, "content": text}]}


def prepare_folder(folder: Path, **keys: Any) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    out = folder.parent / "out"
    out.mkdir()
    preset = LocalDataset(source="local", path="data/local/x", **keys)
    prepared = prepare(folder, preset, out, tokenizer=byte_chat(), seed=1, max_length=MAX_LENGTH, settings=LENIENT)
    return {name: read_jsonl(out / f"{name}.jsonl") for name in ("train", "validation", "test")}, prepared.report


def test_a_row_is_a_document_and_none_is_dropped_for_its_length(tmp_path):
    (tmp_path / "raw").mkdir()
    write_jsonl([{"body": text, "id": 1} for text in [*TEXTS, TEXTS[0], " "]], tmp_path / "raw/rows.jsonl")
    splits, report = prepare_folder(tmp_path / "raw", format="text", completion="body")
    rows = [row for name in splits for row in splits[name]]
    assert sorted(row["messages"][0]["content"] for row in rows) == sorted(TEXTS)
    assert {len(row["messages"]) for row in rows} == {1}
    assert [len(splits[name]) for name in ("validation", "test")] == [4, 4]
    [train] = [split for split in report["splits"] if split["split"] == "train"]
    assert train["dropped"] == {"duplicate": 1, "empty_document": 1}
    assert train["tokens"]["total"]["max"] == MAX_LENGTH
    lengths = [len(row["messages"][0]["content"].encode()) + 1 for row in splits["train"]]
    assert train["sequences"] == sum(-(-length // MAX_LENGTH) for length in lengths)
    assert train["supervised_tokens"] == sum(lengths)
    assert report["columns"] == [{"format": "text", "document": "body", "detected": False}]


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_blank_lines_separate_the_documents_of_a_file(tmp_path, name):
    raw = tmp_path / "raw"
    raw.mkdir()
    content = ("\n\n" + "\n \n\n".join(TEXTS) + "\n").replace("\n", "\r\n").encode("utf-16")
    (raw / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    splits, report = prepare_folder(raw)
    assert sorted(row["messages"][0]["content"] for name in splits for row in splits[name]) == sorted(TEXTS)
    assert report["rows"]["read"] == len(TEXTS)


def test_of_several_text_files_each_is_a_document(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    texts = [f"{text}\n\nA second paragraph." for text in TEXTS]
    for number, text in enumerate(texts):
        (raw / f"{number:02}.txt").write_text(text + "\n")
    splits, _ = prepare_folder(raw, format="text")
    assert sorted(row["messages"][0]["content"] for name in splits for row in splits[name]) == sorted(texts)


def test_a_text_file_beside_rows_is_a_note_and_no_data(tmp_path):
    write_jsonl([{"prompt": text, "completion": "yes"} for text in TEXTS], tmp_path / "train.jsonl")
    (tmp_path / "LICENSE.txt").write_text("Free for all.")
    found = check_file(tmp_path, LocalDataset(source="local", path="x"), seed=1, settings=LENIENT)
    assert [file["file"] for file in found["files"]] == ["train.jsonl"]


def test_every_token_of_every_document_is_in_exactly_one_sequence_and_pack(tmp_path):
    from lathe.training.packing import PaddingFreeCollator, build_packed_dataset, cut_documents

    tokenizer = byte_chat()
    whole = encode(tokenizer, [document(text)["messages"] for text in TEXTS], supervise="all")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for text, sequence in zip(TEXTS, whole, strict=True):
        assert sequence.input_ids == [*tokenizer(text)["input_ids"], end]
        assert all(sequence.supervised)
    pieces = cut_documents(whole, MAX_LENGTH)
    assert max(len(piece.input_ids) for piece in pieces) == MAX_LENGTH
    for row, sequence in enumerate(whole):
        mine = [piece for piece in pieces if piece.row == row]
        assert [token for piece in mine for token in piece.input_ids] == sequence.input_ids
    packs = build_packed_dataset(pieces, max_length=MAX_LENGTH)
    packed = [tuple(ids) for ids in split_packs(packs)]
    assert sorted(packed) == sorted(tuple(piece.input_ids) for piece in pieces)
    # Each piece is a row of its own, whose tokens see nothing of another; all of its tokens but the first have loss.
    batch = PaddingFreeCollator()(list(packs))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) >= len(pieces)
    assert batch["supervised_tokens"] == sum(len(piece.input_ids) - 1 for piece in pieces)


def split_packs(packs: Any) -> list[list[int]]:
    rows = []
    for pack in packs:
        start = 0
        for length in pack["seq_lengths"]:
            rows.append(pack["input_ids"][start : start + length])
            start += length
    return rows


def test_the_text_is_rendered_without_a_template():

    template = read_chat_template(byte_chat())
    messages = document("Some text.")["messages"]
    assert template.render(messages) == "Some text."
    assert split_answer(template, messages) == ("", "Some text.", "<|im_end|>")


@pytest.mark.parametrize(
    ("changes", "code", "parts"),
    [
        ({}, "documents-without-answers", ("exact_match", "perplexity")),
        ({"training.method": "dpo", "evaluate.primary_metric": "perplexity"}, "documents-without-prompts", ("dpo",)),
    ],
)
def test_what_documents_cannot_have_is_said_before_the_training(toy_params, changes, code, parts):
    from conftest import changed

    from lathe.config.load import load

    lengths = dict.fromkeys(("min", "p50", "p90", "p99", "max"), 5)
    references = {"tokens": lengths, "conversation_tokens": lengths, "words": lengths, "json_rows": 0, "documents": 9}
    cut = {"rows": 0, "side": None}
    report = {
        "columns": [{"format": "text"}],
        "splits": [{"split": "validation", "kept": 9, "references": references, "truncated": cut}],
    }
    misfits = list(find_misfits(report, changed(load().params, changes)))
    assert code in [misfit.code for misfit in misfits]
    assert all(any(part in misfit.text + misfit.remedy for misfit in misfits) for part in parts)


def test_the_format_has_neither_prompt_nor_system_message():
    with pytest.raises(ValueError, match="the format text has no prompt"):
        LocalDataset(source="local", path="x", format="text", system_prompt="Be brief.")


def test_columns_beside_text_are_not_taken_for_raw_text_in_silence(tmp_path):
    write_jsonl([{"text": "a", "summary": "b"}], tmp_path / "rows.jsonl")
    with refused("unknown-format", "rows.jsonl", "'summary'"):
        check_file(tmp_path, LocalDataset(source="local", path="x"), seed=1, settings=LENIENT)
