# ruff: noqa: F811 - fixtures are imported, then named as arguments
import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import preloaded
import pytest
from gguf_models import Made, convert, tiny  # noqa: F401 - fixtures
from refusals import refused

from lathe.common import paths
from lathe.gguf import convert_adapter as adapters
from lathe.gguf.description import describe_gguf
from lathe.gguf.llama_library import load_library
from lathe.gguf.llama_model import LlamaModel
from lathe.models.merge import merge

ROW = [1, *range(10, 300, 9)]


def make_adapter(base: Made, folder: Path, **options: Any) -> Path:
    """An adapter on a model, of random weights that change much."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    config = LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    )
    model = get_peft_model(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def to_gguf(adapter: Path, base: Made, out: Path, **options: Any) -> Path:
    arguments = {"outtype": "f16", "llama_cpp": paths.LLAMA_CPP, "metadata": {"lathe.x": "ü 1"}, **options}
    with preloaded.forking():
        adapters.convert_adapter(adapter, base.folder, out, **arguments)
    return out


def logits(file: Path, adapter: Path | None = None) -> np.ndarray:
    """Of a GGUF, with an adapter added to it as llama.cpp's programs do with `--lora`."""
    llama_cpp = load_library()
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 64
    with LlamaModel(file) as model:
        context = llama_cpp.llama_init_from_model(model.handle, params)
        if adapter:
            loaded = llama_cpp.llama_adapter_lora_init(model.handle, str(adapter).encode())
            assert loaded
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(
                ctypes.cast(loaded, llama_cpp.llama_adapter_lora_p_ctypes)
            )
            assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        batch = llama_cpp.llama_batch_init(len(ROW), 0, 1)
        for index, token in enumerate(ROW):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.n_tokens = len(ROW)
        assert llama_cpp.llama_decode(context, batch) == 0
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ROW), model.n_vocab)).copy()
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    return rows.astype(np.float64)


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL in nats per token."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["lora", "rslora", "untied embeddings"],
)
def test_the_base_with_the_adapter_is_the_merged_model(tiny: Made, tmp_path, options):
    adapter = make_adapter(tiny, tmp_path / "adapter", **options)
    (tmp_path / "merged").mkdir()
    merge.merge(tiny.folder, adapter, tmp_path / "merged", dtype="auto", max_shard_size_bytes=10**9)
    merged = logits(convert(tmp_path / "merged", tmp_path / "merged.gguf"))
    file = to_gguf(adapter, tiny, tmp_path / "adapter.gguf")
    base = logits(tiny.gguf)
    assert divergence(merged, base) > 0.02
    assert divergence(merged, logits(tiny.gguf, file)) < 0.01 * divergence(merged, base)
    facts = describe_gguf(file)["metadata"]
    assert facts["general.type"] == "adapter"
    assert facts["lathe.x"] == "ü 1"
    again = to_gguf(adapter, tiny, tmp_path / "again.gguf")
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        ({"use_dora": True}, "adapter-with-dora", ["magnitudes"]),
        ({"modules_to_save": ["lm_head"]}, "adapter-with-whole-layers", [": lm_head.weight"]),
        ({"modules_to_save": ["norm"]}, "adapter-with-whole-layers", [": model.", "norm.weight"]),
    ],
)
def test_what_llama_cpp_would_leave_out_is_refused_with_the_reason(tiny: Made, tmp_path, options, code, parts):
    adapter = make_adapter(tiny, tmp_path / "adapter", **options)
    with refused(code, *parts, error=adapters.AdapterError):
        to_gguf(adapter, tiny, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_update_of_tied_embeddings_is_refused(tiny: Made, tmp_path):
    adapter = make_adapter(tiny, tmp_path / "adapter", target_modules=["embed_tokens"])
    shutil.copytree(tiny.folder, tmp_path / "tied")
    config = tmp_path / "tied/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    code, part = "adapter-with-tied-embeddings", "embeddings that are the output head too"
    with refused(code, part, error=adapters.AdapterError):
        to_gguf(adapter, Made(tmp_path / "tied", tiny.gguf), tmp_path / "adapter.gguf")


def test_what_the_converter_refuses_is_told_in_one_line(tiny: Made, tmp_path):
    adapter = make_adapter(tiny, tmp_path / "adapter")
    shutil.copytree(tiny.folder, tmp_path / "other")
    config = tmp_path / "other/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["NoSuchModel"]}))
    part = "converter refuses it: Model NoSuchModel is not supported"
    with refused("conversion-refused", part, error=adapters.AdapterError) as caught:
        to_gguf(adapter, Made(tmp_path / "other", tiny.gguf), tmp_path / "adapter.gguf")
    assert "\n" not in str(caught.value)
    with refused("no-converter", "no convert_lora_to_gguf.py; run `make setup`") as missing:
        to_gguf(adapter, tiny, tmp_path / "adapter.gguf", llama_cpp=tmp_path)
    assert not isinstance(missing.value, adapters.AdapterError)


def test_the_stage_leaves_the_file_or_the_reason(small_checkout, tiny: Made, tmp_path):
    checkout = small_checkout
    shutil.copytree(tiny.folder, checkout.root / "models/base")
    make_adapter(tiny, checkout.root / "models/adapter")
    assert "data/processed: no such file or folder" in checkout.stage("convert_adapter", check=False).stderr
    (checkout.root / "data/processed").mkdir()
    checkout.stage("convert_adapter")
    file = checkout.root / "models/gguf/adapter/adapter-f16.gguf"
    assert checkout.json("metrics/convert/adapter.json") == {"bytes": file.stat().st_size, "reason": None}
    (checkout.root / "models/adapter/tuning.json").write_text('{"tuning": "full", "left": []}')
    checkout.stage("convert_adapter")
    assert list(file.parent.iterdir()) == []
    facts = checkout.json("metrics/convert/adapter.json")
    assert facts["bytes"] is None
    assert facts["reason"] == "all weights were trained (training.tuning: full): there is no adapter"
