# ruff: noqa: F811 - fixtures are imported, then named as arguments
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from gguf_models import METADATA, Made, convert, qwen, tiny  # noqa: F401 - fixtures
from refusals import refused

from lathe.common import paths
from lathe.gguf import run_converter, tokenizer_parity
from lathe.gguf.description import describe_gguf


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_bytes_depend_neither_on_the_place_nor_on_the_hour(tiny: Made, tmp_path, monkeypatch):
    elsewhere = tmp_path / "another clone" / tiny.folder.name
    shutil.copytree(tiny.folder, elsewhere)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.chdir(tmp_path)
    again = convert(elsewhere, tmp_path / ".merged-f16.gguf.partial")
    assert again.read_bytes() == tiny.gguf.read_bytes()


def test_metadata_is_added_and_replaces_what_the_converter_wrote(tiny: Made, tmp_path):
    named = convert(tiny.folder, tmp_path / "named.gguf", metadata={"lathe.x": "ü 1", "general.name": "Household"})
    metadata = describe_gguf(named)["metadata"]
    assert metadata["lathe.x"] == "ü 1"
    assert metadata["general.name"] == "Household"
    assert describe_gguf(tiny.gguf)["metadata"].items() >= METADATA.items()


def test_the_description_counts_parameters_as_the_model_does(tiny: Made):
    from safetensors import safe_open

    with safe_open(tiny.folder / "model.safetensors", "numpy") as weights:
        count = sum(int(weights.get_slice(name).get_shape()[0]) for name in weights.keys() if "norm" in name)  # noqa: SIM118
        for name in weights.keys():  # noqa: SIM118
            if "norm" not in name:
                rows, columns = weights.get_slice(name).get_shape()
                count += rows * columns
    described = describe_gguf(tiny.gguf)
    assert described["parameters"] == count
    assert described["bytes"] == tiny.gguf.stat().st_size
    assert described["tensor_types"] == {"F16": 16, "F32": 5}
    assert 16 < described["bits_per_weight"] < 16.1
    assert "<|im_start|>" in described["chat_template"]


def test_token_ids_agree_with_a_sentencepiece_vocabulary(tiny: Made):
    assert tokenizer_parity.check_tokens(tiny.folder, tiny.gguf, list(tokenizer_parity.SAMPLE_TEXTS)) > 1000


def test_token_ids_agree_with_the_real_qwen_vocabulary(qwen: Made):
    assert tokenizer_parity.check_tokens(qwen.folder, qwen.gguf, list(tokenizer_parity.SAMPLE_TEXTS)) > 500


def test_a_gguf_of_another_tokenizer_is_refused_with_the_text_and_both_id_lists(tiny: Made, qwen: Made):
    with refused("token-ids-differ", f"{qwen.gguf}: the token ids of 'lamp' differ: ") as caught:
        tokenizer_parity.check_tokens(tiny.folder, qwen.gguf, ["lamp"])
    assert re.search(r"transformers \[\d.*\], llama.cpp \[\d.*\]", str(caught.value))


def test_an_end_token_that_would_not_stop_llama_cpp_is_refused(tiny: Made, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "m")
    edit_json(tmp_path / "m/tokenizer_config.json", eos_token="<pad>")
    with refused("end-token-does-not-stop", f"{tiny.gguf}: '<pad>'"):
        tokenizer_parity.check_tokens(tmp_path / "m", tiny.gguf, ["lamp"])


def test_another_chat_template_is_refused(tiny: Made, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "m")
    with (tmp_path / "m/chat_template.jinja").open("a") as template:
        template.write(" ")
    with refused("other-chat-template", str(tiny.gguf), str(tmp_path / "m")):
        tokenizer_parity.check_tokens(tmp_path / "m", tiny.gguf, ["lamp"])


def test_a_template_that_forgets_the_bos_the_vocabulary_adds_is_refused(tiny: Made, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "m")
    template = tmp_path / "m/chat_template.jinja"
    template.write_text(template.read_text().removeprefix("{{ bos_token }}"))
    made = convert(tmp_path / "m", tmp_path / "m.gguf")
    with refused("token-ids-differ", str(made)) as caught:
        tokenizer_parity.check_tokens(tmp_path / "m", made, ["lamp"])
    assert re.search(r"transformers \[3, .*llama.cpp \[1, 3, ", str(caught.value))


def test_what_the_converter_refuses_is_refused_in_one_line(tiny: Made, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "m")
    edit_json(tmp_path / "m/config.json", architectures=["NoSuchModel"])
    with refused("conversion-refused", "converter refuses it: Model NoSuchModel is not supported") as caught:
        convert(tmp_path / "m", tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.gguf").exists()


def test_a_bare_assertion_of_the_converter_is_named(qwen: Made, tmp_path):
    shutil.copytree(qwen.folder, tmp_path / "m")
    edit_json(tmp_path / "m/config.json", vocab_size=100)
    with refused("conversion-refused", "converter refuses it: assert max(tokenizer.vocab.values()) < vocab_size"):
        convert(tmp_path / "m", tmp_path / "x.gguf")


def test_code_that_comes_with_a_model_is_not_run_even_where_the_converter_would_trust_it(
    tiny: Made, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer

    shutil.copytree(tiny.folder, tmp_path / "m")
    (tmp_path / "m/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    edit_json(tmp_path / "m/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", AutoTokenizer.from_pretrained)  # put back afterwards
    run_converter._refuse_remote_code()
    AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=True)  # as conversion/deepseek.py does
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "code", "part"),
    [
        ({"outtype": "fp16"}, "unknown-output-type", "'fp16' is no output type; did you mean 'f16'"),
        ({"llama_cpp": Path("/nowhere")}, "no-converter", "/nowhere: no convert_hf_to_gguf.py; run `make setup`"),
        ({"folder": Path("/nowhere")}, "incomplete-model", "/nowhere: no config.json"),
        ({}, "incomplete-model", "no model*.safetensors"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_starts(tmp_path, change, code, part):
    (tmp_path / "config.json").write_text("{}")
    with refused(code, part):
        convert(**{"folder": tmp_path, "out": tmp_path / "x.gguf", **change})


def test_a_file_that_is_no_gguf_or_was_cut_is_refused(tiny: Made, tmp_path):
    (tmp_path / "text").write_text("not a model at all")
    with refused("not-gguf", "text: "):
        describe_gguf(tmp_path / "text")
    (tmp_path / "cut").write_bytes(tiny.gguf.read_bytes()[:500])
    with refused("damaged-gguf", "cut: "):
        describe_gguf(tmp_path / "cut")
    with refused("unreadable-gguf", str(tmp_path / "cut"), kept=False) as caught:
        tokenizer_parity.check_tokens(tiny.folder, tmp_path / "cut", ["lamp"])
    assert re.search(r"llama.cpp cannot load it \(.+\)", str(caught.value))


def test_importing_the_module_loads_neither_torch_nor_llama_cpp():
    import subprocess

    heavy = "{'torch', 'transformers', 'llama_cpp', 'gguf'}"
    code = f"import lathe.gguf.convert, lathe.gguf.quantize, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(paths.ROOT / "src")})
    assert done.returncode == 0
