"""The streamed merge against PEFT's own, on small random models of the Qwen3 and Llama architectures."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lathe.models.merge.merge import merge
from lathe.models.merge.write_shards import MergeReport

pytestmark = pytest.mark.heavy

os.environ["HF_HUB_OFFLINE"] = "1"

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
VOCABULARY, GROWN_VOCABULARY = 96, 101


@dataclass(frozen=True)
class Variant:
    """An adapter: on which base, with which LoraConfig, and how exactly its merge must equal PEFT's."""

    base: str
    lora: dict[str, Any]
    resize: int | None = None
    # PEFT rounds an embedding's delta to bf16 before it adds it: one step at the scale of the larger addend.
    rounded_twice: frozenset[str] = field(default_factory=frozenset)
    # Tensors that PEFT's merge gets wrong: it changes a tied head that the trained model did not change.
    not_as_peft: frozenset[str] = field(default_factory=frozenset)
    stays_tied: bool = False


EMBEDDINGS = frozenset({"model.embed_tokens.weight"})
HEAD = frozenset({"lm_head.weight"})

VARIANTS = {
    "attention": Variant("tied", {"target_modules": ATTENTION}, stays_tied=True),
    "all linear": Variant("untied", {"target_modules": "all-linear"}),
    "linear by name": Variant("llama", {"target_modules": LINEAR}),
    "regex": Variant("untied", {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "last block": Variant("untied", {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "rslora": Variant("tied", {"target_modules": LINEAR, "use_rslora": True}, stays_tied=True),
    "dora": Variant("untied", {"target_modules": LINEAR, "use_dora": True}),
    "dora with rslora": Variant("llama", {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    "patterns": Variant(
        "untied",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8, "proj": 3},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 3, "down_proj": 32},
        },
    ),
    "head saved, untied": Variant("untied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "head saved, tied": Variant("tied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "embeddings saved, tied": Variant("tied", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "both saved, tied": Variant("tied", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "both saved, kept tied": Variant(
        "tied",
        {
            "target_modules": ATTENTION,
            "modules_to_save": ["embed_tokens", "lm_head"],
            "ensure_weight_tying": True,
        },
        stays_tied=True,
    ),
    "norms saved": Variant("untied", {"target_modules": ATTENTION, "modules_to_save": ["norm", "q_norm"]}),
    "a block saved": Variant("untied", {"target_modules": LINEAR, "modules_to_save": ["layers.1.mlp"]}),
    "lora on head": Variant("untied", {"target_modules": [*ATTENTION, "lm_head"]}),
    "lora on embeddings": Variant("untied", {"target_modules": [*ATTENTION, "embed_tokens"]}, rounded_twice=EMBEDDINGS),
    "lora on embeddings, tied": Variant(
        "tied",
        {"target_modules": [*ATTENTION, "embed_tokens"]},
        rounded_twice=EMBEDDINGS,
        not_as_peft=HEAD,
    ),
    "lora on embeddings, kept tied": Variant(
        "tied",
        {"target_modules": [*ATTENTION, "embed_tokens"], "ensure_weight_tying": True},
        # PEFT adds the delta to the shared weight twice: once for the embeddings and once for the head.
        not_as_peft=EMBEDDINGS | HEAD,
        stays_tied=True,
    ),
    "lora on embeddings and head, tied": Variant(
        "tied",
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
        # PEFT adds both deltas to the one shared weight.
        not_as_peft=EMBEDDINGS | HEAD,
    ),
    "dora on embeddings": Variant("untied", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "resized, untied": Variant("untied", {"target_modules": ATTENTION}, resize=GROWN_VOCABULARY),
    "resized, tied": Variant("tied", {"target_modules": ATTENTION}, resize=GROWN_VOCABULARY, stays_tied=True),
    "resized with both saved": Variant(
        "untied",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
        resize=GROWN_VOCABULARY,
    ),
    "resized with lora on embeddings and head": Variant(
        "untied",
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
        resize=GROWN_VOCABULARY,
        rounded_twice=EMBEDDINGS,
    ),
    "tokens, tied": Variant("tied", {"target_modules": ATTENTION, "trainable_token_indices": [1, 3]}, stays_tied=True),
    "tokens, untied": Variant(
        "untied",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [4]}},
    ),
    "tokens, resized and tied": Variant(
        "tied",
        {"target_modules": ATTENTION, "trainable_token_indices": [97, 98]},
        resize=GROWN_VOCABULARY,
        stays_tied=True,
    ),
    "lora bias": Variant("llama", {"target_modules": ATTENTION, "lora_bias": True}),
    "biases of lora layers": Variant("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": Variant("llama", {"target_modules": ["q_proj"], "bias": "all"}),
}


@pytest.fixture(scope="module", autouse=True)
def _use_one_thread() -> Iterator[None]:
    # Several threads only wait for each other on models as small as these.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    configs = {
        "tied": Qwen3Config(**sizes, tie_word_embeddings=True),
        "untied": Qwen3Config(**sizes, tie_word_embeddings=False),
        "llama": LlamaConfig(**sizes, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    }
    folder = tmp_path_factory.mktemp("bases")
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        _randomize(model.parameters(), scale=0.3)
        model.save_pretrained(folder / name, max_shard_size="60KB")
    return {name: folder / name for name in configs}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for number, (name, variant) in enumerate(VARIANTS.items()):
        made[name] = folder / str(number)
        _train(bases[variant.base], made[name], variant)
    return made


def _train(base: Path, adapter: Path, variant: Variant) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        _load(base, variant.resize), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=7, **variant.lora)
    )
    _randomize((p for p in model.parameters() if p.requires_grad), scale=0.3)
    if variant.stays_tied and "embed_tokens" in variant.lora["target_modules"]:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        head.lora_A["default"].weight.data = embeddings.lora_embedding_B["default"].data.T.clone()
        head.lora_B["default"].weight.data = embeddings.lora_embedding_A["default"].data.T.clone()
    model.save_pretrained(adapter)


def _load(base: Path, resize: int | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if resize:
        torch.manual_seed(2)
        model.resize_token_embeddings(resize)
    return model


def _randomize(parameters: Any, scale: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            # Around what is there: DoRA's magnitudes and the norms stay positive.
            parameter.add_(torch.randn(parameter.shape) * scale)


def _peft_model(base: Path, adapter: Path, variant: Variant) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_load(base, variant.resize), adapter).eval()


def _merge(base: Path, adapter: Path, out: Path, **options: Any) -> MergeReport:
    out.mkdir()
    return merge(base, adapter, out, **{"dtype": "auto", "max_shard_size_bytes": 5_000_000_000, **options})


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def _steps_apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many representable bf16 numbers lie between the two where they differ most."""

    def position(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dtype == torch.bfloat16
        bits = tensor.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((position(one) - position(other)).abs().max())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_merge_equals_that_of_peft_and_answers_as_the_trained_model(
    name: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    variant = VARIANTS[name]
    _merge(bases[variant.base], adapters[name], tmp_path / "out")
    trained = _peft_model(bases[variant.base], adapters[name], variant)
    merged = _load(tmp_path / "out")

    assert merged.config.tie_word_embeddings == variant.stays_tied
    assert merged.config.vocab_size == (variant.resize or VOCABULARY)
    # Computed in float32: the merged weights are rounded to bf16, the trained model's sum is not.
    answers, expected = _logits(merged), _logits(trained)
    assert answers.shape == expected.shape
    assert float((answers - expected).norm() / expected.norm()) < 0.05

    # Loaded anew, because computing the logits has turned the other into float32.
    trained = _peft_model(bases[variant.base], adapters[name], variant)
    unmerged = {
        key.replace(".base_layer", ""): value.clone() for key, value in trained.get_base_model().state_dict().items()
    }
    theirs = trained.merge_and_unload().state_dict()
    _assert_equal_to_peft(_tensors(tmp_path / "out"), theirs, unmerged, variant)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(torch.arange(model.config.vocab_size).reshape(1, -1)).logits


def _assert_equal_to_peft(
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    unmerged: dict[str, torch.Tensor],
    variant: Variant,
) -> None:
    assert ours.keys() == theirs.keys() - (HEAD if variant.stays_tied else set())
    for name in sorted(ours.keys() - variant.not_as_peft):
        if name in variant.rounded_twice:
            # Half a step of the delta, by PEFT alone, and half a step of the sum by either.
            merged, base = ours[name].float(), unmerged[name].float()
            allowed = (merged - base).abs() * 2**-8 + merged.abs() * 2**-7
            assert ((merged - theirs[name].float()).abs() <= allowed).all(), name
            assert _steps_apart(ours[name], theirs[name]) > 1, "not rounded twice: compare it like the others"
        elif name in EMBEDDINGS | HEAD:
            assert _steps_apart(ours[name], theirs[name]) <= 1, name
        else:
            assert torch.equal(ours[name], theirs[name]), name


def test_lora_on_embeddings_is_the_exact_sum_rounded_once(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    _merge(bases["untied"], adapters["lora on embeddings"], tmp_path / "out")
    adapter = load_file(adapters["lora on embeddings"] / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.embed_tokens.lora_embedding_{x}"].double() for x in "AB")
    base = _tensors(bases["untied"])["model.embed_tokens.weight"].double()
    exact = (base + (b @ a).T * 7 / 4).float().to(torch.bfloat16)
    # The product in float32 may fall on the other side of a rounding boundary, hardly ever.
    merged = _tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert (merged != exact).float().mean() < 0.001


def test_the_head_of_a_tied_model_stays_as_it_was_under_lora_on_the_embeddings(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    _merge(bases["tied"], adapters["lora on embeddings, tied"], tmp_path / "out")
    merged, base = _tensors(tmp_path / "out"), _tensors(bases["tied"])
    assert torch.equal(merged["lm_head.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_tied_base_that_stores_its_head_all_the_same_is_merged_as_tied(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((bases["tied"] / "config.json").read_bytes())
    tensors = _tensors(bases["tied"])
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    for name in ("tokens, tied", "lora on embeddings, tied", "head saved, tied"):
        _merge(base, adapters[name], tmp_path / f"one {name}")
        _merge(bases["tied"], adapters[name], tmp_path / f"two {name}")
        one, two = _tensors(tmp_path / f"one {name}"), _tensors(tmp_path / f"two {name}")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[tensor], two[tensor]) for tensor in one)
        configs = [json.loads((tmp_path / f"{n} {name}/config.json").read_text()) for n in ("one", "two")]
        assert configs[0]["tie_word_embeddings"] == configs[1]["tie_word_embeddings"] == name.startswith("tokens")


def test_the_report_counts_what_changed(bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path) -> None:
    report = _merge(bases["tied"], adapters["attention"], tmp_path / "out")
    merged, base = _tensors(tmp_path / "out"), _tensors(bases["tied"])
    changes = [(merged[name].float() - base[name].float()).abs().max().item() for name in base]
    assert report == MergeReport(
        tensors_total=len(base),
        tensors_changed=2 * len(ATTENTION),
        largest_change=max(changes),
        bytes_written=sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")),
    )
    assert sum(change > 0 for change in changes) == 2 * len(ATTENTION)


def test_two_merges_write_the_same_bytes_whatever_the_number_of_threads(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    for number, count in enumerate((1, 2)):
        torch.set_num_threads(count)
        _merge(bases["untied"], adapters["dora on embeddings"], tmp_path / str(number))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("0", "1"))
    assert one == two


def test_a_tensor_of_many_chunks_equals_one_of_a_single_chunk(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dora on embeddings", "tokens, resized and tied", "lora bias"):
        variant = VARIANTS[name]
        _merge(bases[variant.base], adapters[name], tmp_path / f"one {name}")
        monkeypatch.setattr("lathe.models.merge.lora_delta.CHUNK_ELEMENTS", 7 * 64)
        _merge(bases[variant.base], adapters[name], tmp_path / f"many {name}")
        monkeypatch.undo()
        one, many = _tensors(tmp_path / f"one {name}"), _tensors(tmp_path / f"many {name}")
        assert all(_steps_apart(one[tensor], many[tensor]) <= 1 for tensor in one), name


def test_files_are_written_exactly_as_safetensors_itself_would(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((bases["tied"] / "config.json").read_bytes())
    odd = {
        "a.int": torch.arange(5),
        "b.bool": torch.tensor([True, False, True]),
        "c.single": torch.tensor(2.5),
        "d.byte": torch.arange(3, dtype=torch.uint8),
        "e.half": torch.ones(3, dtype=torch.float16),
        "f.empty": torch.empty(0, 4),
    }
    save_file({**_tensors(bases["tied"]), **odd}, base / "model.safetensors", metadata={"format": "pt"})
    _merge(base, adapters["attention"], tmp_path / "out")
    save_file(_tensors(tmp_path / "out"), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert all(torch.equal(_tensors(tmp_path / "out")[name], tensor) for name, tensor in odd.items())


def test_the_division_into_shards_is_the_base_s(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    _merge(bases["untied"], adapters["all linear"], tmp_path / "out")
    index = "model.safetensors.index.json"
    merged, base = (json.loads((folder / index).read_text()) for folder in (tmp_path / "out", bases["untied"]))
    assert merged["weight_map"] == base["weight_map"]
    assert merged["metadata"]["total_size"] == sum(t.nbytes for t in _tensors(tmp_path / "out").values())
    assert len(set(base["weight_map"].values())) > 2


def test_a_shard_is_divided_further_where_it_would_be_too_large(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_bytes((bases["tied"] / "config.json").read_bytes())
    save_file(_tensors(bases["tied"]), whole / "model.safetensors", metadata={"format": "pt"})
    _merge(whole, adapters["head saved, tied"], tmp_path / "one")
    _merge(whole, adapters["head saved, tied"], tmp_path / "many", max_shard_size_bytes=30_000)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    for path in files:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 30_000
    one, many = _tensors(tmp_path / "one"), _tensors(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one.keys() | many.keys())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_float32_base_is_cast_once_and_its_config_says_so(
    dtype: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((bases["tied"] / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    tensors = {name: tensor.float() + 1e-5 for name, tensor in _tensors(bases["tied"]).items()}
    save_file(tensors, base / "model.safetensors")
    _merge(base, adapters["attention"], tmp_path / "exact")
    _merge(base, adapters["attention"], tmp_path / "cast", dtype=dtype)
    exact, cast = _tensors(tmp_path / "exact"), _tensors(tmp_path / "cast")
    assert all(torch.equal(exact[name].to(getattr(torch, dtype)), cast[name]) for name in exact)
    assert json.loads((tmp_path / "exact/config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "cast/config.json").read_text())["dtype"] == dtype


def test_an_unchanged_config_keeps_its_bytes(bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path) -> None:
    _merge(bases["tied"], adapters["attention"], tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (bases["tied"] / "config.json").read_bytes()


def test_everything_but_weights_is_copied(bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path) -> None:
    base = _copy_of(bases["tied"], tmp_path / "base")
    kept = ["tokenizer.model", "tokenizer.json", "LICENSE", "README.md", "generation_config.json"]
    kept += ["chat_template.jinja", "additional_chat_templates/tool.jinja", "special_tokens_map.json"]
    left = ["pytorch_model.bin", "original/consolidated.00.pth", "training_args.bin", "x.gguf", ".git/HEAD"]
    for name in (*kept, *left):
        (base / name).parent.mkdir(exist_ok=True, parents=True)
        (base / name).write_text(f"base's {name}")
    _merge(base, adapters["attention"], tmp_path / "out")
    for name in kept:
        assert (tmp_path / "out" / name).read_text() == f"base's {name}"
    for name in left:
        assert not (tmp_path / "out" / name).exists()


def test_the_adapter_s_tokenizer_and_template_take_the_place_of_the_base_s(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = _copy_of(bases["tied"], tmp_path / "base")
    adapter = _copy_of(adapters["attention"], tmp_path / "adapter")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (base / name).write_text(f"base's {name}")
    (base / "chat_template.jinja").write_text("base's template")
    (adapter / "tokenizer.json").write_text("adapter's tokenizer.json")
    # The template lies within: one left over from the base beside it would win over it.
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "adapter"}')
    _merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "adapter's tokenizer.json"
    assert (tmp_path / "out/tokenizer_config.json").read_text() == '{"chat_template": "adapter"}'
    assert (tmp_path / "out/tokenizer.model").read_text() == "base's tokenizer.model"
    assert not (tmp_path / "out/chat_template.jinja").exists()
    assert not (tmp_path / "out/special_tokens_map.json").exists()
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_importing_the_merge_does_not_import_transformers_or_peft() -> None:
    code = "import lathe.models.merge.merge, sys; sys.exit(bool({'transformers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_merge_maps_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Peak memory stays below the model: 300 MB of weights in 30 tensors, merged in far less."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter, tmp_path / "out"):
        folder.mkdir()
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(30)]
    save_file({f"{name}.weight": torch.ones(2500, 2000).bfloat16() for name in names}, base / "model.safetensors")
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, 2000)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(2500, 4)
    save_file(factors, adapter / "adapter_model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 30}')
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    code = """
import sys
from pathlib import Path
from lathe.models.merge.merge import merge

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before = peak()
merge(*map(Path, sys.argv[1:]), dtype="auto", max_shard_size_bytes=10**9)
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(base), str(adapter), str(tmp_path / "out")]
    used = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert used < 60_000_000
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(f"{names[7]}.weight"), torch.full((2500, 2000), 5.0).bfloat16())


def _copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
