"""Time and memory of lathe's merge against PEFT's, on a random model of the shape of Qwen3-0.6B.

python benchmarks/merge.py [--pairs 3] [--folder DIR]

Makes the model (bf16, tied embeddings, three shards) and an r = 16 adapter on all linear layers in a
temporary folder (4 GB are needed), merges them in alternation with `lathe.models.merge` and with PEFT (load in bf16,
merge_and_unload, save_pretrained), each time in a fresh process, compares what the two wrote bit by bit, and
prints a Markdown table. Wall seconds are those of the whole process, imports included, then those of the merge
alone; memory is the peak resident set (ru_maxrss), for ours also above a Python that has only imported torch.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import machine

HIDDEN, LAYERS, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, HEAD_DIM, VOCABULARY = (
    1024,
    28,
    3072,
    16,
    8,
    128,
    151_936,
)
RANK, ALPHA = 16, 32
SHARD_BYTES = 500_000_000
MIB = 1 << 20


def main() -> None:
    """Make the model, run the pairs, print the table."""
    arguments = _arguments()
    if arguments.child:
        _run_child(arguments.child, *arguments.paths)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-merge-") as name:
        folder = Path(name)
        base, adapter = folder / "base", folder / "adapter"
        # Made in a process of its own: a child starts with its parent's peak memory as its own.
        _run_apart("make", base, adapter, folder)
        largest_shard = max(path.stat().st_size for path in base.glob("*.safetensors"))
        idle = _measure("idle", base, adapter, folder / "idle").peak_bytes
        runs: dict[str, list[_Run]] = {"lathe": [], "peft": []}
        for pair in range(arguments.pairs):
            order = ("lathe", "peft") if pair % 2 == 0 else ("peft", "lathe")
            for child in order:
                runs[child].append(_measure(child, base, adapter, folder / child))
        equal, total = _count_equal_tensors(folder / "lathe", folder / "peft")
        sys.stdout.write(_report(runs, idle, largest_shard, equal, total))


@dataclass(frozen=True)
class _Run:
    process_seconds: float
    merge_seconds: float
    peak_bytes: int


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="merges by each of the two (default 3)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--child", choices=("make", "idle", "lathe", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _shapes() -> dict[str, tuple[int, ...]]:
    queries, keys = HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        of_layer = {
            "self_attn.q_proj": (queries, HIDDEN),
            "self_attn.k_proj": (keys, HIDDEN),
            "self_attn.v_proj": (keys, HIDDEN),
            "self_attn.o_proj": (HIDDEN, queries),
            "self_attn.q_norm": (HEAD_DIM,),
            "self_attn.k_norm": (HEAD_DIM,),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()})
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes


def _make_base(base: Path) -> None:
    import torch
    from safetensors.torch import save_file

    base.mkdir()
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, shape in _shapes().items():
        tensor = (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, base / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _make_adapter(adapter: Path) -> None:
    import torch
    from safetensors.torch import save_file

    adapter.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in _shapes().items():
        if "_proj" in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.02
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    text = json.dumps({**config, "target_modules": projections})
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")


def _measure(child: str, base: Path, adapter: Path, out: Path) -> _Run:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    # What the last run wrote is still on its way to the disk, and would slow down whoever comes next.
    os.sync()
    started = time.perf_counter()
    measured = json.loads(_run_apart(child, base, adapter, out))
    return _Run(time.perf_counter() - started, measured["seconds"], measured["peak_bytes"])


def _run_apart(child: str, base: Path, adapter: Path, out: Path) -> str:
    """Run one step in a fresh process; return the last line that it wrote."""
    command = [sys.executable, __file__, "--child", child, *map(str, (base, adapter, out))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout.splitlines()[-1]


def _run_child(child: str, base: Path, adapter: Path, out: Path) -> None:
    # Imported by all, so that `idle` shows what they alone take.
    import safetensors.torch  # noqa: F401
    import torch

    started = time.perf_counter()
    if child == "make":
        _make_base(base)
        _make_adapter(adapter)
    elif child == "lathe":
        from lathe.models.merge.merge import merge

        started = time.perf_counter()
        merge(base, adapter, out, dtype="auto", max_shard_size_bytes=5_000_000_000)
    elif child == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    elapsed = time.perf_counter() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"seconds": elapsed, "peak_bytes": peak_bytes}) + "\n")


def _count_equal_tensors(one: Path, other: Path) -> tuple[int, int]:
    """How many tensors of the two folders are equal bit by bit, and how many there are in all."""
    import torch
    from safetensors import safe_open

    def files_by_tensor(folder: Path) -> dict[str, Path]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    def read(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    first, second = files_by_tensor(one), files_by_tensor(other)
    equal = sum(torch.equal(read(first[name], name), read(second[name], name)) for name in first.keys() & second.keys())
    return equal, len(first.keys() | second.keys())


def _report(runs: dict[str, list[_Run]], idle: int, largest_shard: int, equal: int, total: int) -> str:
    def median(child: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs[child])

    def ratios(field: str) -> str:
        pairs = [
            getattr(theirs, field) / getattr(ours, field)
            for ours, theirs in zip(runs["lathe"], runs["peft"], strict=True)
        ]
        return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"

    rows = [
        ("whole process, seconds", "process_seconds", 1.0, ".2f"),
        ("merge alone, seconds", "merge_seconds", 1.0, ".2f"),
        ("peak memory, MiB", "peak_bytes", float(MIB), ".0f"),
    ]
    lines = [
        f"A random Qwen3-0.6B (bf16) and an adapter of r = {RANK}, medians of {len(runs['lathe'])} pairs.",
        f"Machine: {machine.describe()}.",
        "",
        "| | lathe | PEFT | PEFT / lathe (range) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for label, field, unit, form in rows:
        ours, theirs = median("lathe", field) / unit, median("peft", field) / unit
        lines.append(f"| {label} | {ours:{form}} | {theirs:{form}} | {ratios(field)} |")
    worst = max(run.peak_bytes for run in runs["lathe"])
    lines += [
        "",
        f"lathe's highest peak is {(worst - idle) / MIB:.0f} MiB above Python with torch ({idle / MIB:.0f} MiB); "
        f"the largest shard has {largest_shard / MIB:.0f} MiB. {equal} of {total} tensors are equal bit by bit.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
