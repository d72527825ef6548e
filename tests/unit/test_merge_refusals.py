"""Refusals of the merge: each in one line that names the value, and each for its own reason."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from lathe.models.merge.merge import merge

PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"
LORA_A, LORA_B = f"{PREFIX}{Q_PROJ}.lora_A.weight", f"{PREFIX}{Q_PROJ}.lora_B.weight"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Given:
    """A base of one layer and an adapter on its q_proj that can be merged; each test breaks one thing."""

    folder: Path
    base: dict[str, torch.Tensor] = field(
        default_factory=lambda: {
            EMBEDDINGS: torch.ones(10, 4).bfloat16(),
            f"{Q_PROJ}.weight": torch.ones(6, 4).bfloat16(),
            "model.norm.weight": torch.ones(4).bfloat16(),
            HEAD: torch.ones(10, 4).bfloat16(),
        }
    )
    base_config: dict[str, Any] = field(
        default_factory=lambda: {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False}
    )
    adapter: dict[str, torch.Tensor] = field(
        default_factory=lambda: {LORA_A: torch.ones(2, 4), LORA_B: torch.ones(6, 2)}
    )
    adapter_config: dict[str, Any] = field(
        default_factory=lambda: {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    )

    def write(self) -> None:
        for name in ("base", "adapter", "out"):
            (self.folder / name).mkdir()
        save_file(self.base, self.folder / "base/model.safetensors")
        save_file(self.adapter, self.folder / "adapter/adapter_model.safetensors")
        (self.folder / "base/config.json").write_text(json.dumps(self.base_config))
        (self.folder / "adapter/adapter_config.json").write_text(json.dumps(self.adapter_config))

    def merge(self, dtype: str = "auto") -> None:
        paths = (self.folder / name for name in ("base", "adapter", "out"))
        merge(*paths, dtype=dtype, max_shard_size_bytes=10**9)

    def is_refused(self, code: str, *parts: str, dtype: str = "auto") -> None:
        with refused(code, *parts) as caught:
            self.merge(dtype)
        assert "\n" not in str(caught.value)


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return Given(tmp_path)


def test_the_unbroken_base_and_adapter_are_merged(given: Given) -> None:
    given.write()
    given.merge()
    assert (given.folder / "out/model.safetensors").is_file()


UNSUPPORTED, SHAPES = "adapter-unsupported", "shape-mismatch"
ADAPTER_CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "another method": ({"peft_type": "IA3"}, UNSUPPORTED, 'peft_type "IA3"'),
    "no method": ({"peft_type": None}, UNSUPPORTED, "peft_type null"),
    "transposed layers": ({"fan_in_fan_out": True}, UNSUPPORTED, "fan_in_fan_out true"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, UNSUPPORTED, 'init_lora_weights "pissa_niter_4"'),
    "LoftQ": ({"init_lora_weights": "loftq"}, UNSUPPORTED, 'init_lora_weights "loftq"'),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, UNSUPPORTED, "alora_invocation_tokens [1, 2]"),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, UNSUPPORTED, 'kasa_config {"beta": 0.1}'),
    "replicated layers": ({"layer_replication": [[0, 1]]}, UNSUPPORTED, "layer_replication [[0, 1]]"),
    "a variant of the future": ({"use_newlora": True}, UNSUPPORTED, "use_newlora true"),
    "no rank": ({"r": None}, UNSUPPORTED, "r null"),
    "rank zero": ({"r": 0}, UNSUPPORTED, "r 0"),
    "a text for alpha": ({"lora_alpha": "16"}, UNSUPPORTED, 'lora_alpha "16"'),
    "another rank": ({"r": 3}, "adapter-rank", f"{Q_PROJ}.lora_A.weight of shape [2, 4]"),
    "a rank pattern that does not fit": ({"rank_pattern": {"q_proj": 5}}, "adapter-rank", "rank 5"),
    "DoRA without magnitudes": ({"use_dora": True}, "adapter-dora", f"{Q_PROJ} has no lora_magnitude_vector"),
    "a saved module that is absent": ({"modules_to_save": ["lm_head"]}, "adapter-tensor-missing", "'lm_head'"),
}


@pytest.mark.parametrize("name", ADAPTER_CONFIGS)
def test_an_adapter_configuration_that_cannot_be_merged_is_refused(name: str, given: Given) -> None:
    values, code, part = ADAPTER_CONFIGS[name]
    given.adapter_config.update(values)
    given.write()
    given.is_refused(code, part)


ADAPTER_TENSORS: dict[str, tuple[Callable[[Given], Any], str, str]] = {
    "of another width": (
        lambda g: g.adapter.update({LORA_A: torch.ones(2, 5)}),
        SHAPES,
        f"{LORA_A} of shape [2, 5] does not fit {Q_PROJ}.weight of shape [6, 4]",
    ),
    "of another height": (
        lambda g: g.adapter.update({LORA_B: torch.ones(7, 2)}),
        SHAPES,
        f"{LORA_B} of shape [7, 2] does not fit {Q_PROJ}.weight of shape [6, 4]",
    ),
    "on a module that the base has not": (
        lambda g: g.adapter.update(
            {f"{PREFIX}model.layers.7.mlp.up_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        ),
        "base-tensor-missing",
        f"model.layers.7.mlp.up_proj.weight for the adapter's {PREFIX}model.layers.7.mlp.up_proj.lora_B.weight of",
    ),
    "of an unknown kind": (
        lambda g: g.adapter.update({f"{PREFIX}{Q_PROJ}.lora_C.weight": torch.ones(2)}),
        "base-tensor-missing",
        f"{Q_PROJ}.lora_C.weight for the adapter's {PREFIX}{Q_PROJ}.lora_C.weight",
    ),
    "not named by PEFT": (
        lambda g: g.adapter.update({"transformer.x": torch.ones(2)}),
        "adapter-tensor-name",
        "transformer.x does not start with 'base_model.model.'",
    ),
    "without its counterpart": (lambda g: g.adapter.pop(LORA_B), "adapter-tensor-missing", f"{Q_PROJ} has no lora_B"),
    "with a magnitude but no DoRA": (
        lambda g: g.adapter.update({f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": torch.ones(6)}),
        "adapter-dora",
        f"{Q_PROJ} has lora_magnitude_vector, but adapter_config.json says use_dora false",
    ),
    "with a magnitude of another height": (
        lambda g: (
            g.adapter_config.update(use_dora=True),
            g.adapter.update({f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": torch.ones(5)}),
        ),
        SHAPES,
        "lora_magnitude_vector of shape [5] does not fit",
    ),
    "quantized": (
        lambda g: g.adapter.update({PREFIX + HEAD: torch.ones(20, 1, dtype=torch.uint8)}),
        "tensor-not-float",
        f"{PREFIX}{HEAD} is stored as U8",
    ),
    "saved whole, of another shape": (
        lambda g: g.adapter.update({f"{PREFIX}model.norm.weight": torch.ones(5)}),
        SHAPES,
        "model.norm.weight of shape [5] does not fit model.norm.weight of shape [4]",
    ),
    "a head of another width": (
        lambda g: g.adapter.update({PREFIX + HEAD: torch.ones(10, 5)}),
        SHAPES,
        "lm_head.weight of shape [10, 5] does not fit lm_head.weight of shape [10, 4]",
    ),
    "a grown vocabulary without its head": (
        lambda g: g.adapter.update({PREFIX + EMBEDDINGS: torch.ones(12, 4)}),
        "vocabulary-mismatch",
        f"makes {EMBEDDINGS} of shape [12, 4], but {HEAD} stays at [10, 4]",
    ),
    "a bias for a layer without one": (
        lambda g: g.adapter.update({f"{PREFIX}{Q_PROJ}.lora_B.bias": torch.ones(6)}),
        "base-tensor-missing",
        f"{Q_PROJ}.bias for the adapter's {PREFIX}{Q_PROJ}.lora_B.bias",
    ),
    "more token rows than tokens": (
        lambda g: (
            g.adapter_config.update(trainable_token_indices=[1]),
            g.adapter.update({f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}),
        ),
        "adapter-token-rows",
        "has 2 rows, but trainable_token_indices has 1 tokens for model.embed_tokens",
    ),
    "a token past the vocabulary": (
        lambda g: (
            g.adapter_config.update(trainable_token_indices=[10]),
            g.adapter.update({f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}),
        ),
        SHAPES,
        f"trainable_tokens_delta of shape [1, 4] does not fit {EMBEDDINGS} of shape [10, 4]",
    ),
    "none at all": (lambda g: g.adapter.clear(), "adapter-empty", "adapter_model.safetensors"),
    "all zero": (lambda g: g.adapter.update({LORA_B: torch.zeros(6, 2)}), "merge-changes-nothing", "adapter"),
    "too small to change anything": (
        lambda g: g.adapter.update({LORA_B: torch.full((6, 2), 1e-6)}),
        "merge-changes-nothing",
        "adapter",
    ),
    "not a number": (
        lambda g: g.adapter.update({LORA_A: torch.full((2, 4), torch.nan)}),
        "merge-not-finite",
        f"{Q_PROJ}.weight: NaN or infinity in the merged tensor, from the adapter",
    ),
    "infinite": (
        lambda g: g.adapter.update({LORA_A: torch.full((2, 4), 3e38)}),
        "merge-not-finite",
        f"{Q_PROJ}.weight: NaN or infinity in the merged tensor, from the adapter",
    ),
}


@pytest.mark.parametrize("name", ADAPTER_TENSORS)
def test_an_adapter_with_a_tensor_that_does_not_fit_is_refused(name: str, given: Given) -> None:
    break_it, code, part = ADAPTER_TENSORS[name]
    break_it(given)
    given.write()
    given.is_refused(code, part)


def test_the_adapter_of_a_shallower_model_is_refused(given: Given) -> None:
    given.base["model.layers.1.self_attn.q_proj.weight"] = torch.ones(6, 4).bfloat16()
    given.base_config["num_hidden_layers"] = 2
    given.write()
    given.is_refused("layers-not-covered", "model.layers.1.self_attn.q_proj.weight of shape [6, 4]")


@pytest.mark.parametrize(
    "chosen", [{"layers_to_transform": [0]}, {"target_modules": [Q_PROJ]}, {"target_modules": r".*\.0\..*q_proj"}]
)
def test_an_adapter_on_chosen_layers_is_merged(chosen: dict[str, Any], given: Given) -> None:
    given.base["model.layers.1.self_attn.q_proj.weight"] = torch.ones(6, 4).bfloat16()
    given.base_config["num_hidden_layers"] = 2
    given.adapter_config.update(chosen)
    given.write()
    given.merge()


def test_layers_past_those_of_the_model_need_no_adapter(given: Given) -> None:
    given.base["model.layers.1.self_attn.q_proj.weight"] = torch.ones(6, 4).bfloat16()
    given.write()
    given.merge()


def test_a_quantized_base_is_refused(given: Given) -> None:
    given.base_config["quantization_config"] = {"quant_method": "bitsandbytes"}
    given.write()
    given.is_refused("weights-quantized", "config.json: 'quantization_config'")


def test_a_quantized_tensor_of_the_base_is_refused(given: Given) -> None:
    given.base[f"{Q_PROJ}.weight"] = torch.ones(12, 1, dtype=torch.uint8)
    given.write()
    given.is_refused("weights-quantized", f"{Q_PROJ}.weight is stored as U8")


def test_a_model_of_transposed_layers_is_refused(given: Given) -> None:
    given.base_config["model_type"] = "gpt2"
    given.write()
    given.is_refused(UNSUPPORTED, "model_type 'gpt2'")


def test_a_damaged_base_is_told_from_a_diverged_adapter(given: Given) -> None:
    given.base["model.norm.weight"][2] = torch.nan
    given.write()
    given.is_refused("merge-not-finite", "model.norm.weight: NaN or infinity", "base/model.safetensors")


def test_a_value_past_the_range_of_float16_is_refused(given: Given) -> None:
    given.base["model.norm.weight"][2] = 70_000
    given.write()
    given.is_refused(
        "merge-not-finite", "model.norm.weight: NaN or infinity", "from F16", "use bfloat16", dtype="float16"
    )
    (given.folder / "out").rename(given.folder / "failed")
    (given.folder / "out").mkdir()
    given.merge("bfloat16")


def test_an_unknown_dtype_is_refused(given: Given) -> None:
    given.write()
    given.is_refused("merge-dtype-unknown", "'int8'", dtype="int8")


@pytest.mark.parametrize("file", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("left", [0, 5, 60, -1])
def test_a_file_cut_short_is_refused_by_name(file: str, left: int, given: Given) -> None:
    given.write()
    whole = (given.folder / file).read_bytes()
    (given.folder / file).write_bytes(whole[:left])
    given.is_refused("safetensors-invalid", file)


@pytest.mark.parametrize(
    ("file", "pickle"),
    [
        ("base/model.safetensors", "base/pytorch_model.bin"),
        ("adapter/adapter_model.safetensors", "adapter/adapter_model.bin"),
    ],
)
def test_pickled_weights_are_refused_by_name(file: str, pickle: str, given: Given) -> None:
    given.write()
    (given.folder / file).rename(given.folder / pickle)
    given.is_refused("weights-pickled", f"{pickle}: ")


@pytest.mark.parametrize(
    ("file", "code", "place"),
    [
        ("base/model.safetensors", "weights-missing", "base: "),
        ("base/config.json", "no-such-file", "base/config.json: "),
        ("adapter/adapter_model.safetensors", "weights-missing", "adapter/adapter_model.safetensors: "),
        ("adapter/adapter_config.json", "no-such-file", "adapter/adapter_config.json: "),
    ],
)
def test_a_missing_file_is_refused_by_name(file: str, code: str, place: str, given: Given) -> None:
    given.write()
    (given.folder / file).unlink()
    given.is_refused(code, place)


@pytest.mark.parametrize("file", ["base/config.json", "adapter/adapter_config.json"])
@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        (b'{"r": 2,', "not-json", ":1: "),
        (b"[1]", "no-json-object", ": "),
        (b'{"r": "\xff"}', "not-utf8", ": byte 7 "),
    ],
)
def test_a_broken_configuration_is_refused_by_name(file: str, text: bytes, code: str, place: str, given: Given) -> None:
    given.write()
    (given.folder / file).write_bytes(text)
    given.is_refused(code, f"{file}{place}")


def test_a_missing_base_is_refused(given: Given) -> None:
    given.write()
    (given.folder / "base").rename(given.folder / "elsewhere")
    given.is_refused("not-a-folder", "base: ")


@pytest.mark.parametrize(
    ("weight_map", "code", "place"),
    [
        ({"model.norm.weight": "model-9.safetensors"}, "shard-missing", "model-9.safetensors: "),
        ({"model.norm.weight": "../base/part.safetensors"}, "shard-missing", "part.safetensors: "),
        (
            {"model.other.weight": "part.safetensors"},
            "tensor-missing",
            "part.safetensors: no tensor model.other.weight",
        ),
        ({}, "index-without-weight-map", "index.json: "),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(
    weight_map: dict[str, str], code: str, place: str, given: Given
) -> None:
    given.write()
    (given.folder / "base/model.safetensors").rename(given.folder / "base/part.safetensors")
    index = given.folder / "base/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    given.is_refused(code, place)
