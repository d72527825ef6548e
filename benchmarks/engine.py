"""Speed of the pipeline's answers against llama-server and llama-batched-bench, on the same cores and the same rows.

python benchmarks/engine.py [--rounds 3] [--rows 130] [--shape-rows 32] [--only NAME]

reads   models/gguf, data/processed/{validation,test}.jsonl, which the pipeline leaves in this checkout
prints  Markdown: tokens per second and equal answers on each file; then each goal

`lathe.inference.generate`, which the stages `generate` use, and `llama-server -np 32` (`make llama-server` builds it)
get the same prompts as token ids, answer greedily, and are asked in turn, round by round, in one run; both have loaded
the model. llama-server is asked with twice as many requests in flight as it has slots: once as `lathe serve` starts it,
once with its own defaults. Files: the fine-tuned model (SmolLM2-135M) in f16, Q8_0 and Q4_K_M, and a random model of
Qwen3-0.6B's shape in Q8_0, whose answers all take as many tokens as they may. An answer is equal if all its token ids
are. llama-batched-bench decodes as many sequences of as many tokens without choosing any. Last, the peak memory of a
process that answers 1,000 and 10,000 rows with a model of one layer of 64.

Where other work shares the cores, seconds say little: a thread that has to wait holds up the other at each operation of
a graph. Processor seconds are those of this process, and those of llama-server without its clients.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import machine
import psutil

from lathe.commands.general import choose_generation_sizes
from lathe.common import paths
from lathe.common.jsonl import iterate_jsonl
from lathe.gguf import convert
from lathe.gguf.build_llama_server import BATCHED_BENCH, SERVER, find_program
from lathe.gguf.quantize import quantize
from lathe.inference.generate import Completion, Generator
from lathe.inference.llama_server import LlamaServer, build_environment
from lathe.inference.serve_requests import GREEDY
from lathe.inference.shared_prefix import SequenceStats, TokenSequence

PARALLEL = 32
SHAPE_TOKENS = 32  # in an answer of the random model
LEAST = 1.0  # times lathe's time that llama-server is to take
MORE_MEMORY_ALLOWED = 1.1  # at ten times the rows
MIB = 1 << 20
LATHE, AS_SERVED, DEFAULT = "lathe", f"{SERVER}, as served", f"{SERVER}, its defaults"
ITS_DEFAULTS = ("--repack", "--flash-attn", "auto")

Answers = list[list[int]]  # token ids of each
Times = tuple[list[float], list[float]]  # seconds, and processor seconds


class _IdGenerator(Generator):
    """Gives token ids, without the one that ends an answer, in place of text."""

    def _make_completion(self, answer: Iterable[int], *, ended: bool) -> Completion:
        tokens = list(answer)
        return Completion(json.dumps(tokens[:-1] if ended else tokens), "stop" if ended else "length", len(tokens))


@dataclass(frozen=True)
class _Workload:
    title: str
    gguf: Path
    prompts: list[list[int]]
    longest: int
    n_ctx: int


def main() -> None:
    """Time both on every file, then measure memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each answers (default 3)")
    parser.add_argument("--rows", type=int, default=130, help="of validation and test (default 130: all)")
    parser.add_argument("--shape-rows", type=int, default=32, help="to the model of Qwen3's shape (default 32)")
    parser.add_argument("--only", help="a file's name, such as Q8_0: leave out the others and the memory")
    parser.add_argument("--memory-of", nargs=2, metavar=("FILE", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _answer_rows(Path(options.memory_of[0]), int(options.memory_of[1]))
        return
    for needed in (paths.GGUF / "merged-f16.gguf", paths.DATA_PROCESSED / "test.jsonl"):
        if not needed.exists():
            raise SystemExit(f"error: {needed}: no such file; run the pipeline first: make repro")
    if not find_program(SERVER):
        raise SystemExit("error: llama-server is not built; run make llama-server first")
    print(f"{machine.describe()}; {options.rounds} rounds, {PARALLEL} rows at once\n", flush=True)
    print(
        "| file | | seconds | generated tokens/s | times lathe's (range) | processor seconds | equal answers |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    met, bench = {}, []
    with tempfile.TemporaryDirectory() as name:
        for workload in _workloads(options, Path(name)):
            times, answers = _time(workload, options.rounds)
            met |= _print(workload, times, answers)
            bench.append(_run_batched_bench(workload))
    print("\n| file | llama-batched-bench: prompts, tokens/s | generated tokens/s |\n| --- | ---: | ---: |")
    print("\n".join(bench), flush=True)
    if not options.only:
        with tempfile.TemporaryDirectory() as name:
            small = _make_shape(Path(name), hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            peaks = {count: _peak(small, count) for count in (1_000, 10_000)}
        print("\n| rows answered | peak memory, MiB |\n| ---: | ---: |")
        print("\n".join(f"| {count:,} | {peak / MIB:.0f} |" for count, peak in peaks.items()))
        goal = f"10,000 rows take at most {MORE_MEMORY_ALLOWED:g} times the memory of 1,000"
        met[goal] = peaks[10_000] <= MORE_MEMORY_ALLOWED * peaks[1_000]
    print("\n" + "\n".join(f"{'met' if reached else 'MISSED'}: {goal}" for goal, reached in met.items()))


def _workloads(options: argparse.Namespace, folder: Path) -> Iterator[_Workload]:
    sizes = choose_generation_sizes()
    for name in ("merged-f16", "Q8_0", "Q4_K_M"):
        if (paths.GGUF / f"{name}.gguf").exists() and options.only in (None, name):
            gguf = paths.GGUF / f"{name}.gguf"
            yield _Workload(name, gguf, _read_prompts(gguf, options.rows), sizes.max_new_tokens, sizes.n_ctx)
    if options.only in (None, "Qwen3"):
        gguf = _make_shape(folder)
        yield _Workload(
            "Qwen3-0.6B's shape, Q8_0", gguf, _read_prompts(gguf, options.shape_rows), SHAPE_TOKENS, sizes.n_ctx
        )


def _read_prompts(gguf: Path, count: int) -> list[list[int]]:
    files = (paths.DATA_PROCESSED / f"{split}.jsonl" for split in ("validation", "test"))
    rows = itertools.islice(itertools.chain.from_iterable(map(iterate_jsonl, files)), count)
    with _open(gguf) as generator:
        render = generator.chat_template.render
        return [generator.tokenize(render(row["messages"][:-1], add_generation_prompt=True)) for row in rows]


def _make_shape(folder: Path, **sizes: int) -> Path:
    """Make a random model of Qwen3-0.6B's shape, but for `sizes`, with the real vocabulary."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    models = paths.LLAMA_CPP / "models"
    tokenizer = AutoTokenizer.from_pretrained(models, gguf_file="ggml-vocab-qwen2.gguf")
    tokenizer.chat_template = (models / "templates/Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, **sizes}
    config = Qwen3Config(
        **shape,
        vocab_size=151936,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=151645,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "shape")
    tokenizer.save_pretrained(folder / "shape")
    del model
    f16, out = folder / "shape-f16.gguf", folder / "shape-Q8_0.gguf"
    convert.convert(folder / "shape", f16, outtype="f16", llama_cpp=paths.LLAMA_CPP, metadata={})
    quantize(f16, out, type="Q8_0", threads=os.cpu_count() or 1)
    f16.unlink()
    return out


def _open(gguf: Path) -> _IdGenerator:
    return _IdGenerator(gguf, n_parallel=PARALLEL, n_ctx=choose_generation_sizes().n_ctx, threads=os.cpu_count() or 1)


def _time(workload: _Workload, rounds: int) -> tuple[dict[str, Times], dict[str, Answers]]:
    times: dict[str, Times] = {}
    answers: dict[str, Answers] = {}
    with ExitStack() as stack:
        ways = _ways(workload, stack)
        for answer, _ in ways.values():
            answer(workload.prompts[:4])  # what is done once
        for number in range(rounds):
            for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
                answer, process = ways[name]
                began, before = time.perf_counter(), sum(process.cpu_times()[:2])
                answers[name] = answer(workload.prompts)
                seconds, processor = times.setdefault(name, ([], []))
                seconds.append(time.perf_counter() - began)
                processor.append(sum(process.cpu_times()[:2]) - before)
                print(f"{workload.title}: {name}: {seconds[-1]:.2f} s, {processor[-1]:.2f} s", file=sys.stderr)
    return times, answers


def _ways(
    workload: _Workload, stack: ExitStack
) -> dict[str, tuple[Callable[[Sequence[list[int]]], Answers], psutil.Process]]:
    generator = stack.enter_context(_open(workload.gguf))
    program = find_program(SERVER)
    assert program

    def start(*options: str) -> LlamaServer:
        return stack.enter_context(
            LlamaServer(
                program,
                workload.gguf,
                n_ctx=workload.n_ctx,
                parallel=PARALLEL,
                threads=os.cpu_count() or 1,
                connections=2 * PARALLEL,
                options=options,
            )
        )

    def lathe(prompts: Sequence[list[int]]) -> Answers:
        rows = [TokenSequence.of(number, tokens, n_ctx=workload.n_ctx) for number, tokens in enumerate(prompts)]
        answered = generator.answer_sequences(rows, SequenceStats.of(rows), max_new_tokens=workload.longest)
        written = {number: json.loads(completion.text) for number, completion in answered}
        return [written[number] for number in range(len(prompts))]

    as_served, default = start(), start(*ITS_DEFAULTS)
    return {
        LATHE: (lathe, psutil.Process()),
        AS_SERVED: (
            lambda prompts: asyncio.run(_ask(as_served, prompts, workload.longest, **GREEDY)),
            psutil.Process(as_served.pid),
        ),
        DEFAULT: (
            lambda prompts: asyncio.run(_ask(default, prompts, workload.longest)),
            psutil.Process(default.pid),
        ),
    }


async def _ask(server: LlamaServer, prompts: Sequence[list[int]], longest: int, **more: Any) -> Answers:
    answers: Answers = [[] for _ in prompts]
    waiting = iter(enumerate(prompts))
    transport = httpx2.AsyncHTTPTransport(uds=str(server.socket), limits=httpx2.Limits(max_connections=None))
    headers = {"Authorization": f"Bearer {server.key}"}
    async with httpx2.AsyncClient(transport=transport, timeout=None, headers=headers) as client:

        async def ask_one_after_another() -> None:
            for number, prompt in waiting:
                body = {"prompt": prompt, "n_predict": longest, "temperature": 0, "return_tokens": True, **more}
                response = await client.post("http://engine/completion", json=body)
                response.raise_for_status()
                answer = response.json()
                # Without the token that ends it, as lathe's.
                answers[number] = answer["tokens"][:-1] if answer["stop_type"] == "eos" else answer["tokens"]

        await asyncio.gather(*(ask_one_after_another() for _ in range(2 * PARALLEL)))
    return answers


def _print(workload: _Workload, times: dict[str, Times], answers: dict[str, Answers]) -> dict[str, bool]:
    goals = {}
    for name, (taken, processor) in times.items():
        median = statistics.median(taken)
        ratios = [other / own for own, other in zip(times[LATHE][0], taken, strict=True)]
        ratio = statistics.median(ratios)
        compared = "" if name == LATHE else f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        equal = sum(own == other for own, other in zip(answers[LATHE], answers[name], strict=True))
        shown = "" if name == LATHE else f"{equal} of {len(workload.prompts)}"
        tokens = sum(map(len, answers[name]))
        cells = (f"{median:.2f}", f"{tokens / median:,.0f}", compared, f"{statistics.median(processor):.2f}", shown)
        print(f"| {workload.title} | {name} | {' | '.join(cells)} |", flush=True)
        if name != LATHE:
            goals[f"{workload.title}: {name} takes at least {LEAST:g} times as long as lathe"] = ratio >= LEAST
            ratio = statistics.median(processor) / statistics.median(times[LATHE][1])
            goals[f"{workload.title}: {name} takes at least {LEAST:g} times lathe's processor time"] = ratio >= LEAST
    return goals


def _run_batched_bench(workload: _Workload) -> str:
    program = find_program(BATCHED_BENCH)
    assert program
    prompt = round(statistics.mean(map(len, workload.prompts)))
    command = [str(program), "-m", str(workload.gguf), "-c", str(PARALLEL * (prompt + workload.longest))]
    command += ["-npp", str(prompt), "-ntg", str(workload.longest), "-npl", str(PARALLEL), "--output-format", "jsonl"]
    command += ["-t", str(os.cpu_count() or 1), "-b", "2048", "-ub", "512", "-fa", "off"]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=build_environment(os.environ, ""),
    )
    [result] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return f"| {workload.title} | {result['speed_pp']:,.0f} | {result['speed_tg']:,.0f} |"


def _peak(gguf: Path, count: int) -> int:
    command = [sys.executable, __file__, "--memory-of", str(gguf), str(count)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


def _answer_rows(gguf: Path, count: int) -> None:
    with _open(gguf) as generator:
        render = generator.chat_template.render
        conversations = [row["messages"][:-1] for row in iterate_jsonl(paths.DATA_PROCESSED / "test.jsonl")]
        texts = [render(messages, add_generation_prompt=True) for messages in conversations]

        def iterate_prompts() -> Iterator[str]:
            return itertools.islice(itertools.cycle(texts), count)

        answered = sum(1 for _ in generator.iterate_completions(iterate_prompts, max_new_tokens=4))
    assert answered == count
    # Not getrusage: its peak begins with that of the process that forked this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    print(int(found[1]) << 10)


if __name__ == "__main__":
    main()
