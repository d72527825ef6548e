"""Options of the chat template, and tools: from the training through the merge into the GGUF, by one template."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import changed, write_splits
from gguf_models import convert
from toy import load_toy

from lathe.gguf.llama_model import LlamaModel
from lathe.models.answer_reading import render_prompt
from lathe.models.loss_mask import encode
from lathe.models.merge.merge import merge
from lathe.models.template_options import load_tokenizer_with_options, set_options
from lathe.models.templates.builtin_templates import read_template
from lathe.models.tokenizer import load_tokenizer
from lathe.training.train import train

TEMPLATE = read_template("chatml-tools").replace("system\\n' + system", "system\\n' + (manner or '') + system")
OPTIONS = {"manner": "Be brief. "}
TOOL = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}
CHANGES = {
    "seed": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "eval_steps": 2,
    "max_length": 512,
    "quantization.load_in_4bit": False,
}


def make_row(number: int) -> dict:
    call = {"type": "function", "function": {"name": "lamp", "arguments": {"room": number}}}
    messages = [
        {"role": "user", "content": f"switch on lamp {number}"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    worse = {"role": "assistant", "content": "No."}
    return {"messages": messages, "rejected": [worse], "tools": [TOOL]}


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_every_method_trains_on_tools_and_its_files_have_the_template_with_its_options(small_model, tmp_path, method):
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ 'another' }}"}))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    splits = write_splits(tmp_path / "data", {name: list(map(make_row, range(4))) for name in ("train", "validation")})
    more = {
        "dpo": {"dpo.sft_epochs": 0, "dpo.num_train_epochs": 1},
        "grpo": {"grpo.sft_epochs": 0, "grpo.max_steps": 1},
    }
    params = changed(
        load_toy().params,
        {**CHANGES, "method": method, "preprocess.chat_template_kwargs": OPTIONS, **more.get(method, {})},
    )
    (tmp_path / "adapter").mkdir()
    train(base, splits, tmp_path / "adapter", tmp_path / "metrics", params=params)
    expected = set_options(TEMPLATE, OPTIONS)
    assert (tmp_path / "adapter/chat_template.jinja").read_text() == expected
    if method == "sft":
        check_merged(base, tmp_path, expected)


def check_merged(base: Path, folder: Path, expected: str) -> None:
    (folder / "merged").mkdir()
    merge(base, folder / "adapter", folder / "merged", dtype="auto", max_shard_size_bytes=10**9)
    merged = load_tokenizer(folder / "merged")
    assert merged.chat_template == expected
    row = make_row(7)
    [sequence] = encode(
        load_tokenizer_with_options(base, OPTIONS), [row["messages"]], supervise="last", tools=[row["tools"]]
    )
    with LlamaModel(convert(folder / "merged", folder / "merged.gguf"), vocab_only=True) as vocabulary:
        prompt = render_prompt(vocabulary.chat_template, row["messages"], row["tools"]).prompt
        assert "Be brief. " in prompt
        assert vocabulary.tokenize_prompt(prompt) == sequence.input_ids[: sequence.supervised.index(True)]
