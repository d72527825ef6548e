"""Decoding on the CPU with llama.cpp's FlashAttention and without it, behind prompts of several lengths.

reads   models/gguf/base-f16.gguf, or the GGUF given
prints  a Markdown table: seconds to decode a prompt, 40 more tokens of one sequence, and one token of eight sequences

    python benchmarks/attention.py [FILE.gguf]

Each length is measured with one and then the other, in turn, in one process; the best of three rounds counts. Lathe
decodes without on a CPU (`lathe.inference.kv_cache`).
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine

from lathe.common import paths
from lathe.gguf.llama_library import load_library
from lathe.inference.generate import Generator

LENGTHS = (16, 256, 1024, 2048)
SEQUENCES, MORE, STEPS, ROUNDS = 8, 40, 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", type=Path, default=paths.GGUF / "base-f16.gguf", help="which model")
    gguf = parser.parse_args().gguf
    library = load_library()
    draw = random.Random(0)
    rows = []
    with Generator(gguf, n_parallel=SEQUENCES, n_ctx=max(LENGTHS) + 100, threads=os.cpu_count() or 1) as generator:
        tokens = [draw.randrange(1000, generator.model.n_vocab // 2) for _ in range(max(LENGTHS) + MORE + STEPS)]
        for length in LENGTHS:
            best: dict[bool, list[float]] = {}
            for _ in range(ROUNDS):
                for flash in (True, False):
                    # What the cache asks before it turns FlashAttention off.
                    library.llama_supports_gpu_offload = lambda flash=flash: flash
                    measured = measure(generator, tokens, length)
                    best[flash] = [min(pair) for pair in zip(measured, best.get(flash, measured), strict=True)]
            rows.append((length, best[True], best[False]))
    print_table(rows, gguf)


def measure(generator: Generator, tokens: list[int], length: int) -> list[float]:
    """Return the seconds for the prompt, for MORE tokens behind it, and for a token of each of SEQUENCES."""
    with generator.make_cache(slots=SEQUENCES, length=length + 100, min_rows=SEQUENCES) as cache:
        prompt = _seconds(lambda: cache.feed(0, tokens[:length], first_output=length))
        more = _seconds(lambda: cache.feed(0, tokens[: length + MORE], first_output=length + MORE - 1))
        for slot in range(1, SEQUENCES):
            cache.copy(0, slot)
        steps = _seconds(lambda: [cache.step(tokens[step : step + SEQUENCES]) for step in range(STEPS)])
    return [prompt, more, steps / STEPS]


def print_table(rows: list[tuple[int, list[float], list[float]]], gguf: Path) -> None:
    lines = [
        machine.describe(),
        "",
        f"| tokens before, {gguf.name} | prompt | {MORE} tokens more | a token of {SEQUENCES} sequences |",
        "| --- | ---: | ---: | ---: |",
    ]
    for length, flash, plain in rows:
        cells = [f"{one:.3f} → {other:.3f} s ({one / other:.2f})" for one, other in zip(flash, plain, strict=True)]
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
