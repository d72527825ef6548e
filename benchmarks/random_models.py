"""Random models of real shapes, and adapters for them, written tensor by tensor: memory stays below two shards."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

RANK, ALPHA = 16, 32
SHARD_BYTES = 500_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `kind` is its model_type: llama, or qwen3, which normalises queries and keys too."""

    kind: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Weights in all; the output layer is the embeddings."""
        total = 0
        for sizes in list_tensors(self).values():
            count = 1
            for size in sizes:
                count *= size
            total += count
        return total


QWEN3_600M = Shape("qwen3", 1024, 28, 3072, 16, 8, 128, 151_936)


def list_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the sizes of every tensor by its name."""
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    hidden, between = shape.hidden, shape.intermediate
    of_layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (between, hidden),
        "mlp.up_proj": (between, hidden),
        "mlp.down_proj": (hidden, between),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if shape.kind == "qwen3":
        of_layer |= {"self_attn.q_norm": (shape.head_dim,), "self_attn.k_norm": (shape.head_dim,)}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, hidden)}
    for layer in range(shape.layers):
        tensors.update({f"model.layers.{layer}.{name}.weight": sizes for name, sizes in of_layer.items()})
    return {**tensors, "model.norm.weight": (hidden,)}


def make_base(shape: Shape, folder: Path, tokenizer: Path | None = None) -> None:
    """Fill a new folder with a random model in bf16, in shards, and with the tokenizer of the folder `tokenizer`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = total = number = 0

    def write() -> None:
        nonlocal shard, size, number
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for name, sizes in list_tensors(shape).items():
        tensor = (torch.randn(sizes, generator=generator) * 0.02).to(torch.bfloat16)
        if name.endswith("norm.weight"):
            tensor = torch.ones_like(tensor)
        if shard and size + tensor.nbytes > SHARD_BYTES:
            write()
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": ["Qwen3ForCausalLM" if shape.kind == "qwen3" else "LlamaForCausalLM"],
        "model_type": shape.kind,
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
    }
    if tokenizer:
        own = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
        config |= {
            key: own[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "rope_theta") if key in own
        }
        for file in (*tokenizer.glob("*token*"), *tokenizer.glob("*.jinja"), *tokenizer.glob("generation_config.json")):
            shutil.copy2(file, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def make_adapter(shape: Shape, folder: Path) -> None:
    """Fill a new folder with a random LoRA adapter of rank 16 on all linear layers."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, sizes in list_tensors(shape).items():
        if "_proj" in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, sizes[1], generator=generator) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(sizes[0], RANK, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    text = json.dumps({**config, "target_modules": projections})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
