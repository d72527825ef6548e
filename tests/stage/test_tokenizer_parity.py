"""Before training: token ids of the rows are llama.cpp's, and a difference elsewhere is only reported."""

import json
from pathlib import Path
from typing import Literal

import preloaded
import pytest
from base_models import make
from conftest import Checkout, add_small_inputs
from refusals import refused
from shared import made_once

from lathe.common import paths
from lathe.common.jsonl import write_jsonl
from lathe.gguf import convert as converter
from lathe.gguf import tokenizer_parity
from lathe.gguf.row_texts import RowTexts
from lathe.models.tokenizer import load_tokenizer
from lathe.models.tokenizer_template import read_chat_template

SPLIT = "UT"  # which no text has that the converter knows a vocabulary by


def make_split_model(folder: Path) -> None:
    """Fill a folder with a Llama whose tokenizer divides words at SPLIT, which llama.cpp does not."""
    make("LlamaForCausalLM", folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"String": SPLIT}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder; its vocabulary as llama.cpp has it is beside it."""

    def make_both(folder: Path) -> None:
        make_split_model(folder)
        with preloaded.forking():
            converter.convert_vocabulary(
                folder, folder.with_suffix(".gguf"), llama_cpp=paths.LLAMA_CPP, shown="model split"
            )

    return made_once(tmp_path_factory, "split", make_both)


def compare(model: Path, texts: list[str], samples: Literal["rows", "strict"] = "rows") -> tokenizer_parity.Parity:
    return tokenizer_parity.compare_tokenizers(
        model, model.with_suffix(".gguf"), texts, samples=samples, shown="model split"
    )


def test_a_difference_on_samples_alone_is_a_warning_that_names_them(split_model, caplog):
    parity = compare(split_model, ["switch on the lamp", "<|im_start|>user\nwhy?<|im_end|>"])
    assert parity.differing_samples == ("capitals",)
    assert parity.texts == 2
    assert parity.tokens > 500
    assert "model split: llama.cpp gives other token ids than its tokenizer for sample texts (capitals)" in caplog.text


def test_a_difference_on_samples_is_refused_where_all_must_agree(split_model):
    with refused("token-ids-differ", "model split", "I'M SHOUTING"):
        compare(split_model, [], samples="strict")


def test_a_text_that_differs_is_refused_with_its_number_and_where_it_begins_to_differ(split_model):
    text = "a lamp and another lamp and a third lamp " * 3 + "LOOK OUTSIDE"
    with refused("token-ids-differ", "model split", "from token", kept=False) as caught:
        compare(split_model, ["a lamp", text])
    assert caught.value.number == 1
    assert len(str(caught.value)) < 500


def test_texts_of_rows_are_all_rendered_with_their_places_or_evenly_sampled(split_model, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pair = {"messages": chat, "rejected": [{"role": "assistant", "content": "c"}]}
    write_jsonl([{"messages": chat}, pair], tmp_path / "train.jsonl")
    write_jsonl([{"messages": chat}] * 100, tmp_path / "test.jsonl")
    template = read_chat_template(load_tokenizer(split_model))
    splits = {name: tmp_path / f"{name}.jsonl" for name in ("train", "test")}
    every = RowTexts(template, splits, max_bytes=None)
    texts = list(every)
    assert (len(texts), every.rows) == (103, 102)
    assert texts[2].endswith("c<|im_end|>\n")
    assert every.describe_place(2) == "train, row 2"
    size = (tmp_path / "test.jsonl").stat().st_size
    sample = RowTexts(template, {"test": splits["test"]}, max_bytes=size // 10)
    assert len(list(sample)) in (9, 10)
    assert sample.describe_place(1) in ("test, row 11", "test, row 12")


def test_no_gguf_asks_for_an_end_token_after_a_prompt(tmp_path, monkeypatch):
    import sys

    monkeypatch.syspath_prepend(str(paths.LLAMA_CPP / "gguf-py"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    from gguf import GGUFReader, GGUFWriter

    from lathe.gguf import run_converter

    monkeypatch.setattr(GGUFWriter, "write_header_to_file", GGUFWriter.write_header_to_file)
    run_converter._add_metadata({})
    for asked in (True, None):
        file = tmp_path / f"{asked}.gguf"
        writer = GGUFWriter(file, "llama")
        if asked:
            writer.add_add_eos_token(True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        field = GGUFReader(file).fields.get(run_converter.ADD_END_TOKEN)
        assert field is None if asked is None else field.contents() is False


def test_preprocess_refuses_a_row_that_llama_cpp_reads_otherwise(checkout: Checkout, split_model: Path) -> None:
    add_small_inputs(checkout, split_model)
    fetched = checkout.stage("fetch", "model", "dataset")
    assert "sample texts (capitals)" in fetched.stderr
    checkout.stage("preprocess")
    [token_ids] = checkout.json("metrics/preprocess/report.json")["token_ids"]
    assert token_ids["differing_samples"] == ["capitals"]
    assert token_ids["rows_compared"] == 60 == token_ids["texts_compared"]

    with (checkout.root / "data/local/few.jsonl").open("a") as rows:
        rows.write(json.dumps({"ask": "LOOK OUTSIDE", "reply": "why?"}) + "\n")
    checkout.stage("fetch", "dataset")
    done = checkout.stage("preprocess", check=False)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if "LOOK OUTSIDE" in line]
    assert "its token ids differ from token" in line
    assert "leave them out, or choose another base" in line
    assert "Traceback" not in done.stderr
