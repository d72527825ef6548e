"""Speed and memory of lathe's answers against a plain llama_cpp.Llama loop and transformers' generate.

python benchmarks/generate.py [--rounds 5] [--rows 500] [--shared-rows 64]

Takes what the pipeline left in this checkout: models/gguf/merged-f16.gguf, models/merged and data/processed/test.jsonl.
These answer the same prompts greedily, in turn, in one process, round by round: lathe, with the n_parallel of
params.yaml; llama_cpp.Llama, one prompt after another, as its users call it (it keeps what a prompt has in common with
the one before); the same made to forget, as where others ask in between; transformers' `generate` with the same weights
in float32, one prompt after another. Models are loaded before. Three workloads: the test split; its first rows behind a
shared system prompt of about 500 tokens, put to the default model, which has never seen one and answers nonsense; and
the same put to a model of Qwen3's shape (hidden 512, 8 layers, heads of 128, the real vocabulary) whose weights make
the next token certain.

Answers of the plain loop must be lathe's, but for nonsense, where two tokens are often as good as equal; those of
transformers are compared. Every mismatch is listed. Prints Markdown tables: seconds, generated tokens per second, and
how many times as long the others took (median and range over the rounds); then the peak memory of a fresh process that
answers and scores 1,000 and 10,000 rows; then for each goal whether it is met.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machine

from lathe.commands.general import choose_generation_sizes
from lathe.common import paths
from lathe.common.jsonl import iterate_jsonl, write_jsonl
from lathe.config.load import load
from lathe.gguf import convert
from lathe.gguf.llama_model import LlamaModel
from lathe.inference.generate import Generator

SYSTEM_TOKENS = 500
CERTAIN_TOKENS = 20  # in an answer of the model whose next token is certain
MORE_MEMORY_ALLOWED = 1.1  # at ten times the rows
MIB = 1 << 20
LLAMA, FORGETFUL, TRANSFORMERS = "llama_cpp.Llama", "llama_cpp.Llama, forgetful", "transformers"
PEERS = (LLAMA, FORGETFUL, TRANSFORMERS)

Answers = list[tuple[str, int]]  # text, and tokens with the ending one
Ways = dict[str, Callable[[Sequence[str]], Answers]]


@dataclass
class _Timed:
    seconds: dict[str, list[float]]
    answers: dict[str, Answers]


@dataclass(frozen=True)
class _Workload:
    """Prompts for a model; `goals` say how many times as long as lathe others are to take."""

    title: str
    gguf: Path
    folder: Path
    messages: Sequence[Sequence[Any]]
    longest: int
    goals: dict[str, float]
    certain: bool = True  # no two tokens are as good as equal: the same file must give the same answers


def main() -> None:
    """Time every way on every workload, measure memory, and say which goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each way answers (default 5)")
    parser.add_argument("--rows", type=int, default=500, help="of the test split (default 500)")
    parser.add_argument("--shared-rows", type=int, default=64, help="behind the system prompt (default 64)")
    parser.add_argument("--memory-of", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _answer_and_score(options.memory_of)
        return
    test = paths.DATA_PROCESSED / "test.jsonl"
    for needed in (paths.GGUF / "merged-f16.gguf", paths.MODEL_MERGED, test):
        if not needed.exists():
            raise SystemExit(f"error: {needed}: no such file; run the pipeline first: make repro")
    print(f"{machine.describe()}; {options.rounds} rounds\n", flush=True)
    conversations = [row["messages"] for row in itertools.islice(iterate_jsonl(test), options.rows)]
    met = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for workload in _workloads(conversations, options.shared_rows, folder):
            timed = _run(workload, options.rounds)
            for peer, goal in workload.goals.items():
                met[f"{workload.title}: {peer} takes {goal:g} times as long"] = _ratio(timed, peer) >= goal
        peaks = {count: _peak(conversations, count, folder) for count in (1_000, 10_000)}
    print("| rows answered and scored | peak memory, MiB |\n| ---: | ---: |")
    for count, peak in peaks.items():
        print(f"| {count:,} | {peak / MIB:.0f} |")
    fewer, more = peaks.values()
    met[f"10,000 rows take at most {MORE_MEMORY_ALLOWED:g} times the memory of 1,000"] = (
        more <= MORE_MEMORY_ALLOWED * fewer
    )
    print("\n" + "\n".join(f"{'met' if reached else 'MISSED'}: {goal}" for goal, reached in met.items()))


def _workloads(conversations: Sequence[Any], shared_rows: int, folder: Path) -> Iterator[_Workload]:
    file, merged = paths.GGUF / "merged-f16.gguf", paths.MODEL_MERGED
    longest = choose_generation_sizes().max_new_tokens
    requests = [conversation[:-1] for conversation in conversations]
    yield _Workload("test split", file, merged, requests, longest, {LLAMA: 2.0, TRANSFORMERS: 4.0})

    def behind_a_system_prompt(path: Path) -> list[Any]:
        with LlamaModel(path, vocab_only=True) as model:
            return [[{"role": "system", "content": _system_prompt(model)}, *each] for each in requests[:shared_rows]]

    title = "shared system prompt"
    yield _Workload(title, file, merged, behind_a_system_prompt(file), longest, {}, certain=False)
    certain = _make_certain(folder / "certain")
    messages = behind_a_system_prompt(certain)
    yield _Workload(
        f"{title}, Qwen3's shape",
        certain,
        folder / "certain",
        messages,
        CERTAIN_TOKENS,
        {FORGETFUL: 5.0, TRANSFORMERS: 5.0},
    )


def _make_certain(folder: Path) -> Path:
    """Make a model of Qwen3's shape that follows every token with the one a hundred further in its vocabulary."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    models = paths.LLAMA_CPP / "models"
    tokenizer = AutoTokenizer.from_pretrained(models, gguf_file="ggml-vocab-qwen2.gguf")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (models / "templates/Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=151645,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:  # they compute, and add nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(100, dims=0))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = folder.with_suffix(".gguf")
    convert.convert(folder, out, outtype="f16", llama_cpp=paths.LLAMA_CPP, metadata={})
    return out


def _run(workload: _Workload, rounds: int) -> _Timed:
    with Generator(workload.gguf, **_settings()) as generator:
        prompts = [_prompt(generator, messages) for messages in workload.messages]
        timed = _time(_ways(generator, workload), prompts, rounds)
        _print(workload, generator, prompts, timed)
    return timed


def _settings() -> dict[str, Any]:
    n_ctx = max(choose_generation_sizes().n_ctx, 2 * SYSTEM_TOKENS)
    return {"n_parallel": load().params.generate.n_parallel, "n_ctx": n_ctx, "threads": os.cpu_count() or 1}


def _ways(generator: Generator, workload: _Workload) -> Ways:
    import torch
    from llama_cpp import Llama
    from transformers import AutoModelForCausalLM

    longest, threads = workload.longest, generator.threads
    llama = Llama(str(workload.gguf), n_ctx=generator.n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False)
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(workload.folder, dtype=torch.float32).eval()
    ends = [token for token in range(generator.model.n_vocab) if generator.model.is_end(token)]

    def lathe(prompts: Sequence[str]) -> Answers:
        return [(answer.text, answer.tokens) for answer in generator.complete(prompts, max_new_tokens=longest)]

    def plain_loop(prompts: Sequence[str], *, forgetful: bool = False) -> Answers:
        answers = []
        for prompt in prompts:
            if forgetful:
                llama.reset()
            tokens = llama.tokenize(
                prompt.encode(), add_bos=not prompt.startswith(generator.chat_template.bos_token), special=True
            )
            answer: Any = llama.create_completion(tokens, max_tokens=longest, temperature=0.0)
            [choice] = answer["choices"]
            # It does not count the token that ends an answer.
            ended = choice["finish_reason"] == "stop"
            answers.append((choice["text"], answer["usage"]["completion_tokens"] + ended))
        return answers

    def transformers(prompts: Sequence[str]) -> Answers:
        answers = []
        for prompt in prompts:
            tokens = generator.tokenize(prompt)
            with torch.inference_mode():
                written = model.generate(
                    torch.tensor([tokens]),
                    attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                    max_new_tokens=longest,
                    do_sample=False,
                    eos_token_id=ends,
                    pad_token_id=ends[0],
                )[0, len(tokens) :].tolist()
            text = b"".join(map(generator.model.get_token_bytes, written)).decode("utf-8", "replace")
            answers.append((text, len(written)))
        return answers

    forgetful_loop = partial(plain_loop, forgetful=True)
    return {"lathe": lathe, LLAMA: plain_loop, FORGETFUL: forgetful_loop, TRANSFORMERS: transformers}


def _time(ways: Ways, prompts: Sequence[str], rounds: int) -> _Timed:
    timed = _Timed({name: [] for name in ways}, {})
    for answer in ways.values():
        answer(prompts[:4])  # what is done once
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            began = time.perf_counter()
            timed.answers[name] = ways[name](prompts)
            timed.seconds[name].append(time.perf_counter() - began)
            print(f"{name}: {timed.seconds[name][-1]:.2f} s", file=sys.stderr)
    return timed


def _print(workload: _Workload, generator: Generator, prompts: Sequence[str], timed: _Timed) -> None:
    lengths = [len(generator.tokenize(prompt)) for prompt in prompts]
    generated = sum(tokens for _, tokens in timed.answers["lathe"])
    print(f"{workload.title}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens")
    print(f"lathe generates {generated:,} tokens\n")
    print("| | seconds | generated tokens/s | times lathe's (range) |\n| --- | ---: | ---: | ---: |")
    for name, seconds in timed.seconds.items():
        median = statistics.median(seconds)
        ratios = [other / own for own, other in zip(timed.seconds["lathe"], seconds, strict=True)]
        times = f"{_ratio(timed, name):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if name in PEERS else ""
        print(f"| {name} | {median:.2f} | {generated / median:,.0f} | {times} |")
    print()
    for peer in PEERS:
        answers = zip(prompts, timed.answers["lathe"], timed.answers[peer], strict=True)
        differing = [(prompt, own, other) for prompt, own, other in answers if own != other]
        same = 1 - len(differing) / len(prompts)
        print(f"Answers that are {peer}'s, token for token: {100 * same:.1f} %")
        for prompt, (own, _), (other, _) in differing:
            print(f"- {prompt[-120:]!r}: lathe {own!r}, {peer} {other!r}")
        if peer != TRANSFORMERS and differing and workload.certain:
            raise SystemExit("error: the plain loop and lathe run the same file and must give the same answers")
    print(flush=True)


def _ratio(timed: _Timed, peer: str) -> float:
    pairs = zip(timed.seconds["lathe"], timed.seconds[peer], strict=True)
    return statistics.median(other / own for own, other in pairs)


def _prompt(generator: Generator, messages: Sequence[Any]) -> str:
    return generator.chat_template.render(messages, add_generation_prompt=True)


def _system_prompt(model: LlamaModel) -> str:
    rules = "You look after the lamps, doors and windows of this house; every room has its rules. "
    rooms = ("attic", "kitchen", "library", "cellar", "garage", "nursery", "office", "hallway")
    text = rules
    for number in itertools.count():
        if len(model.tokenize(text)) >= SYSTEM_TOKENS:
            return text
        text += f"In the {rooms[number % len(rooms)]} nothing is switched on after {number % 12 + 1} o'clock. "
    raise AssertionError


def _peak(conversations: Sequence[Any], count: int, folder: Path) -> int:
    file = folder / f"{count}.jsonl"
    write_jsonl(({"messages": each} for each in itertools.islice(itertools.cycle(conversations), count)), file)
    command = [sys.executable, __file__, "--memory-of", str(file)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout))


def _answer_and_score(file: Path) -> None:
    from lathe.inference.held_out import HeldOutRun, iterate_rows
    from lathe.inference.journal import open_journal

    merged = paths.GGUF / "merged-f16.gguf"
    with open_journal(file.with_suffix(""), "answers") as journal, Generator(merged, **_settings()) as generator:
        run = HeldOutRun(generator, journal)
        prompts = run.store_prompts("test", iterate_rows(file, max_rows=None))
        run.measure_split("test", prompts, file.with_suffix(".out"), max_new_tokens=32)
    # Not getrusage: its peak begins with that of the process that forked this one.
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match
    print(int(match[1]) << 10)


if __name__ == "__main__":
    main()
