"""Loss of many supervised tokens over a real vocabulary: logits held, and TRL's tiles; time and memory of each.

    python benchmarks/loss.py [--positions 8192] [--hidden 1024] [--vocabulary 151936] [--rounds 5] [--share 0.33]

The last hidden states of `positions` tokens, `share` of them supervised, go through a frozen head of bf16 to the loss,
and a gradient comes back to them, as in `compute_step_loss` with and without `in_tiles`. Each way runs in a process of
its own, in turn, in every round: the seconds are of the second of two passes; the bytes are what the resident size rose
to above what it was before, with malloc told to return what is freed. On a GPU they are torch's own count. On the CPU
TRL scores every position, on a GPU the supervised ones alone, which `tiles, supervised alone` does here too.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine

WAYS = ("held", "tiles", "tiles, supervised alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--share", type=float, default=1.0, help="of the positions that are supervised")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    print(machine.describe())
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            found[way].append(run(way))
            print(f"{way}: {json.dumps(found[way][-1])}", file=sys.stderr)
    print("| | seconds | times the seconds of held (range) | bytes at the peak | loss |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, results in found.items():
        ratios = [mine["seconds"] / held["seconds"] for mine, held in zip(results, found["held"], strict=True)]
        seconds, most = (statistics.median(result[key] for result in results) for key in ("seconds", "bytes"))
        print(
            f"| {way} | {seconds:.2f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {most / 1e6:,.0f} MB | {results[0]['loss']:.6f} |"
        )


def run(way: str) -> dict[str, float]:
    """Measure one way in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--way", way],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Run two forward and backward passes; return seconds of the second, bytes at the peak, and the mean loss."""
    import torch
    from trl.trainer import utils

    from lathe.training.loss import IGNORE_INDEX
    from lathe.training.training_step import compute_step_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.way == "tiles, supervised alone":
        utils._use_triton = lambda device: True  # for the choice of positions alone
    generator = torch.Generator().manual_seed(1)
    positions, vocabulary, hidden = arguments.positions, arguments.vocabulary, arguments.hidden
    model = make_model(vocabulary, hidden, device)
    supervised = torch.rand(positions, generator=generator) < arguments.share
    columns = supervised.nonzero().flatten()
    ids = torch.randint(vocabulary, (1, positions), generator=generator)
    batch = {"input_ids": ids, "columns": columns, "targets": ids[:, columns]}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    assert not (batch["targets"] == IGNORE_INDEX).any()
    model.states = torch.randn(1, positions, hidden, generator=generator).to(device, torch.bfloat16)
    model.states.requires_grad_(True)
    model.states.grad = torch.zeros_like(model.states)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = read_resident("VmRSS")
    for _ in range(2):
        started = time.perf_counter()
        loss = compute_step_loss(model, batch, in_tiles=arguments.way != "held")
        loss.backward()
        mean = loss.item() / len(columns)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    most = torch.cuda.max_memory_allocated() if device == "cuda" else read_resident("VmHWM")
    return {"seconds": seconds, "bytes": most - before, "loss": mean}


def make_model(vocabulary: int, hidden: int, device: str) -> Any:
    """Return a model that is only its head: its last hidden states are `states`, (1, positions, hidden)."""
    import torch
    from transformers import PretrainedConfig
    from transformers.modeling_outputs import CausalLMOutput
    from trl.trainer import add_fused_lm_head

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = PretrainedConfig()
            self.lm_head = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=torch.bfloat16, device=device)
            self.requires_grad_(False)
            self.states: Any = None

        def base_model(self, **_: Any) -> Any:
            return SimpleNamespace(last_hidden_state=self.states)

        def get_output_embeddings(self) -> Any:
            return self.lm_head

        def forward(self, *, logits_to_keep: torch.Tensor, **_: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=self.lm_head(self.states[:, logits_to_keep]))

    torch.manual_seed(0)
    model = Head()
    add_fused_lm_head(model)
    return model


def read_resident(key: str) -> int:
    """Return a size of this process in bytes, by its name in /proc/self/status."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match
    return 1024 * int(match[1])


if __name__ == "__main__":
    main()
