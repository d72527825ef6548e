"""What a later stage needs besides the trained model is asked for when the training starts: a table of causes."""

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import make
from conftest import changed
from refusals import refused
from safetensors.torch import load_file, save_file
from shared import made_once
from toy import load_toy

from lathe.common import paths
from lathe.config.generation_params import ServedArtifact
from lathe.config.held_out_checks import find_misfits
from lathe.doctor.checks import Circumstances
from lathe.doctor.doctor import check_later
from lathe.gguf.base_tensors import list_possible_tensors
from lathe.gguf.tensor_list import list_tensors
from lathe.needs.later_stages import check_later_stages

CONFIG = load_toy()
JUDGE = {"judge.enabled": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "whole", lambda folder: make("LlamaForCausalLM", folder))


@pytest.fixture
def base(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with rows of 64 values, in a checkout with the texts that stages read."""
    for name in (CONFIG.params.evaluate.general_text, CONFIG.params.judge.rubric):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(paths.ROOT / name, tmp_path / name)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "MODEL_ENCODER", tmp_path / "models/encoder")
    folder = tmp_path / "models/base"
    shutil.copytree(whole, folder)
    return folder


def nothing(base: Path) -> None:
    del base


def remove(name: str) -> Callable[[Path], object]:
    return lambda base: (paths.ROOT / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda base: (paths.ROOT / name).write_bytes(content)


def grow(base: Path) -> None:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def add_encoder(base: Path) -> None:
    from transformers import BertConfig, BertTokenizerFast

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    folder = paths.MODEL_ENCODER
    folder.mkdir(parents=True)
    BertConfig(vocab_size=6, max_position_embeddings=64, **sizes).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    (paths.ROOT / "baseline.csv").write_text("LAYER,P,R,F\n0,0.1,0.1,0.1\n1,0.2,0.2,0.2\n")


BERT = {
    "evaluate.metrics": ["exact_match", "bert_score"],
    "bert_score.model": "any",
    "bert_score.num_layers": 2,
    "bert_score.max_length": 64,
    "bert_score.baseline": None,
}
SERVED = [
    ServedArtifact(artifact=artifact, url="http://127.0.0.1:9/v1", model=artifact)
    for artifact in ("base", "merged", *CONFIG.params.quantize.types)
]
KEYS = {"OPENAI_API_KEY": "a-key", "LATHE_SERVER_API_KEY": "two words"}
GENERAL, RUBRIC = CONFIG.params.evaluate.general_text, CONFIG.params.judge.rubric
LACKING: dict[str, tuple[dict[str, Any], Callable[[Path], object], str, str]] = {
    "the general text": ({}, remove(GENERAL), "missing-file", "evaluate.general_text"),
    "the general text's paragraphs": ({}, write(GENERAL, b"\n \n"), "no-text", GENERAL),
    "the general text's encoding": ({}, write(GENERAL, b"\xff\xfe"), "not-utf-8", GENERAL),
    "the rubric": ({}, remove(RUBRIC), "missing-file", "judge.rubric"),
    "the rubric's text": ({}, write(RUBRIC, b" "), "empty-file", "rubric is empty"),
    "the judge's file": (
        {**JUDGE, "judge.provider": "gguf", "judge.model": "models/local/judge.gguf", "judge.base_url": None},
        nothing,
        "missing-file",
        "judge.model is 'models/local/judge.gguf'",
    ),
    "the judge's certificates": (
        {**JUDGE, "judge.ca_bundle": "none.pem"},
        nothing,
        "invalid-ca-bundle",
        "judge.ca_bundle",
    ),
    "what the judge compares with": (
        {**JUDGE, "judge.mode": "pairwise", "judge.against": "no-such-experiment"},
        lambda base: subprocess.run(["git", "init", "--quiet", str(paths.ROOT)], check=True),
        "no-such-revision",
        "judge.against: ",
    ),
    "the environment of vLLM": (
        {"generate.engine": "vllm", "generate.vllm_python": "no/python", "evaluate.allow_mixed_engines": True},
        nothing,
        "no-vllm",
        "generate.vllm_python is no/python",
    ),
    "a key that is one": (
        {"generate.engine": "server", "generate.servers": SERVED},
        nothing,
        "invalid-key",
        "LATHE_SERVER_API_KEY holds a space",
    ),
    "the program that quantizes": ({"quantize.binary": "bin/llama-quantize"}, nothing, "missing-program", "binary"),
    "a right to run it": (
        {"quantize.binary": "llama-quantize"},
        write("llama-quantize", b"#!/bin/sh\n"),
        "missing-program",
        "quantize.binary is llama-quantize",
    ),
    "rows for the type of the embeddings": (
        {"quantize.token_embedding_type": "Q6_K"},
        nothing,
        "rows-do-not-fit-blocks",
        "quantize.token_embedding_type is Q6_K, which stores blocks of 256 values; the rows of "
        "model.embed_tokens.weight have 64",
    ),
    "rows for the type of the head": (
        {"quantize.output_tensor_type": "Q4_K"},
        nothing,
        "rows-do-not-fit-blocks",
        "quantize.output_tensor_type is Q4_K",
    ),
    "a tensor of the pattern": (
        {"quantize.tensor_types": ["ffn_dwn=Q8_0"]},
        nothing,
        "no-such-tensor",
        "did you mean 'ffn_down'?",
    ),
    "a block of the pattern": (
        {"quantize.tensor_types": [r"blk\.7\.attn_v=Q8_0"]},
        nothing,
        "no-such-tensor",
        "matches no tensor",
    ),
    "room for weights in the merged type": (
        {"merge.dtype": "float16"},
        grow,
        "weights-beyond-f16",
        "the base's model.norm.weight holds 999424",
    ),
    "layers of the encoder": ({**BERT, "bert_score.num_layers": 3}, add_encoder, "too-many-layers", "num_layers is 3"),
    "length of the encoder": (
        {**BERT, "bert_score.max_length": 65},
        add_encoder,
        "max-length-too-long",
        "the encoder takes 64 tokens",
    ),
    "the baseline's file": ({**BERT, "bert_score.baseline": "none.csv"}, add_encoder, "missing-file", "none.csv"),
    "the baseline's layer": ({**BERT, "bert_score.baseline": "baseline.csv"}, add_encoder, "missing-layer", "layer 2"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_what_a_later_stage_lacks_is_refused_before_the_training(base, lacking):
    changes, damage, code, said = LACKING[lacking]
    damage(base)
    params = changed(CONFIG.params, changes)
    with refused(code, said, kept=False) as caught:
        list(check_later_stages(params, base, KEYS))
    assert "\n" not in str(caught.value)
    here = Circumstances(paths.ROOT, KEYS)
    findings = check_later(CONFIG.model_copy(update={"params": params}), here)
    assert [(finding.status, finding.text) for finding in findings] == [("fail", str(caught.value))]


def test_a_server_that_does_not_answer_yet_is_warned_of_before_the_training(base):
    params = changed(CONFIG.params, {"generate.engine": "server", "generate.servers": SERVED})
    warnings = list(check_later_stages(params, base, {}))
    assert len(warnings) == len(SERVED)
    assert all("cannot be reached" in text and "unless that has changed by then" in text for text in warnings)


def test_a_run_that_has_it_all_passes(base):
    add_encoder(base)
    changes = {
        **BERT,
        **JUDGE,
        "judge.mode": "pairwise",
        "judge.against": "merged",
        "bert_score.num_layers": 1,
        "bert_score.baseline": "baseline.csv",
        "merge.dtype": "float16",
        "quantize.token_embedding_type": "Q8_0",
        "quantize.tensor_types": [r"blk\.1\.ffn_down=Q8_0", "attn_v=F16"],
    }
    params = changed(CONFIG.params, changes)
    assert list(check_later_stages(params, base, {"OPENAI_API_KEY": "a-key"})) == []
    [warning] = check_later_stages(params, base, {})
    assert "OPENAI_API_KEY is not set" in warning
    assert list(check_later_stages(params, base.with_name("none"), {"OPENAI_API_KEY": "a-key"})) == []
    with refused("invalid-key", "OPENAI_API_KEY holds a space", kept=False) as caught:
        list(check_later_stages(params, base, {"OPENAI_API_KEY": "se cret"}))
    assert "cret" not in str(caught.value)


def test_a_judge_needs_its_packages(base, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tenacity" else find(name))
    with refused("missing-extra", "tenacity", "make setup EXTRAS=judge", kept=False):
        list(check_later_stages(changed(CONFIG.params, JUDGE), base, {}))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForConditionalGeneration"])
def test_no_tensor_that_a_gguf_has_is_taken_for_impossible(tmp_path, name):
    from gguf_models import convert

    make(name, tmp_path / "base")
    made = {tensor.name for tensor in list_tensors(convert(tmp_path / "base", tmp_path / "a.gguf"))}
    weights = {name for name in made if name.endswith(".weight") and not name.endswith("_norm.weight")}
    assert len(weights) > 10
    assert weights <= set(list_possible_tensors(tmp_path / "base"))


REFERENCES = {
    "tokens": {"min": 1, "p50": 1, "p90": 1, "p99": 1, "max": 1},
    "conversation_tokens": {"min": 1, "max": 2},
    "words": {"p50": 1},
    "json_rows": 0,
    "tool_rows": 0,
}


@pytest.mark.parametrize(
    ("changes", "found", "said"),
    [
        ({"evaluate.primary_metric": "json_fields"}, {}, "evaluate.primary_metric needs json_fields"),
        ({"evaluate.gates": ["Q8_0.json_valid > 0.9"]}, {}, "the gate 'Q8_0.json_valid > 0.9' needs json_valid"),
        ({"evaluate.gates": ["merged.tool_calls_f1 > 0"]}, {"json_rows": 3}, "needs tool_calls_f1"),
        ({"evaluate.gates": ["merged.tool_calls_f1 > 0"]}, {"tool_rows": 1}, None),
        ({"evaluate.primary_metric": "json_fields"}, {"json_rows": 1}, None),
    ],
)
def test_a_score_that_no_row_has_neither_chooses_nor_gates(changes, found, said):
    truncated = {"side": "prompt", "rows": 0}
    splits = [
        {"split": name, "kept": 3, "truncated": truncated, "references": {**REFERENCES, **found}}
        for name in ("validation", "test")
    ]
    metrics = ["exact_match", "json_valid", "json_fields", "rouge_l"]
    base = {"evaluate.gates": None, "evaluate.primary_metric": "exact_match", "evaluate.metrics": metrics}
    misfits = list(find_misfits({"splits": splits}, changed(CONFIG.params, {**base, **changes})))
    codes = [misfit.code for misfit in misfits if misfit.code]
    assert codes == (["score-without-rows"] if said else [])
    if said:
        assert any(said in misfit.text for misfit in misfits)


def test_a_tokenizer_without_an_end_token_is_refused(base):
    from lathe.models.check_base import check_base

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (base / name).is_file():
            content = json.loads((base / name).read_text())
            content.pop("eos_token", None)
            (base / name).write_text(json.dumps(content))
    with refused("no-end-token", "model mine", "set eos_token", kept=False):
        check_base(base, "model mine")
