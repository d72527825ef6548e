"""Throughput, waiting and memory of `lathe serve` under many requests at once, with each of its engines.

python benchmarks/serve.py [--concurrency 64] [--requests 128] [--rounds 3] [--gguf FILE] [--max-tokens 64]

reads   models/gguf/merged-f16.gguf and data/processed/test.jsonl, which the pipeline leaves in this checkout
prints  Markdown: requests and tokens per second, seconds to the first token, memory, dropped requests; then each goal

`--concurrency` clients send chat requests of the test split as streams, each its next one once the last has ended.
llama-server (`make llama-server`) and llama-cpp-python's server, which answers one request at a time, are started and
asked in turn, round by round; figures are medians over the rounds. Every answer must be whole; a request that is
refused, cut off or without an end counts as dropped. Memory is the peak of the server and of the process that it has
started. At the end llama-server is killed while it answers, which must leave no request without an answer in time.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import machine
import psutil

from lathe.common import paths
from lathe.common.jsonl import iterate_jsonl
from lathe.gguf.build_llama_server import SERVER, find_program
from lathe.gguf.llama_model import LlamaModel

ENGINES = ("llama-cpp-python", SERVER)
KEY = "benchmark"
TIMES_AS_MANY = 3.0  # requests a second, against llama-cpp-python's server
MORE_MEMORY_ALLOWED = 1.1  # after five times the requests
LONGEST_SECONDS = 900.0  # of one request
SECONDS_TO_RESTART = 30.0
MIB = 1 << 20


@dataclass
class _Answer:
    status: int = 0
    text: str = ""
    finished: bool = False
    first_seconds: float = 0.0  # from sending to the first piece of text
    seconds: float = 0.0


@dataclass
class _Round:
    seconds: float
    answers: list[_Answer]
    peak_bytes: int

    @property
    def whole(self) -> list[_Answer]:
        return [answer for answer in self.answers if answer.finished]


@dataclass
class _Measured:
    rounds: list[_Round] = field(default_factory=list)


def main() -> None:
    """Measure both engines in turn, then what many more requests and a kill do to llama-server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=paths.GGUF / "merged-f16.gguf", help="which model")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once (default 64)")
    parser.add_argument("--requests", type=int, default=128, help="in a round (default 128)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine is asked (default 3)")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default 64)")
    options = parser.parse_args()
    test = paths.DATA_PROCESSED / "test.jsonl"
    for needed in (options.gguf, test):
        if not needed.exists():
            raise SystemExit(f"error: {needed}: no such file; run the pipeline first: make repro")
    if not find_program(SERVER):
        raise SystemExit("error: llama-server is not built; run make llama-server first")
    conversations = [row["messages"][:-1] for row in iterate_jsonl(test)]
    bodies = [
        {"messages": messages, "max_tokens": options.max_tokens, "stream": True}
        for messages in itertools.islice(itertools.cycle(conversations), options.requests)
    ]
    print(f"{machine.describe()}; {options.gguf.name}, {options.rounds} rounds\n", flush=True)
    measured = {engine: _Measured() for engine in ENGINES}
    for number in range(options.rounds):
        for engine in ENGINES if number % 2 == 0 else reversed(ENGINES):
            with _serving(options.gguf, engine) as (address, process):
                measured[engine].rounds.append(_ask_all(address, process, bodies, options.concurrency))
                print(f"{engine}: {measured[engine].rounds[-1].seconds:.1f} s", file=sys.stderr)
    met = _print_table(measured, options)
    met |= _measure_memory(options, bodies)
    met |= _kill(options, bodies)
    print("\n" + "\n".join(f"{'met' if reached else 'MISSED'}: {goal}" for goal, reached in met.items()))


@contextmanager
def _serving(gguf: Path, engine: str) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "lathe", "serve", "--gguf", str(gguf), "--port", "0", "--engine", engine]
    environment = {**os.environ, "LATHE_API_KEY": KEY, "PYTHONPATH": str(paths.ROOT / "src")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        try:
            said = ""
            for line in server.stderr:
                said += line
                if found := re.search(r"http://\S+/v1", line):
                    break
            else:
                raise SystemExit(said)
            asyncio.run(_ask(found[0], [_SHORT], 1))  # what is done once
            yield found[0], psutil.Process(server.pid)
        finally:
            server.terminate()


_SHORT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "stream": True}


def _ask_all(address: str, server: psutil.Process, bodies: list[dict[str, Any]], concurrency: int) -> _Round:
    began = time.perf_counter()
    answers = asyncio.run(_ask(address, bodies, concurrency))
    seconds = time.perf_counter() - began
    return _Round(seconds, answers, sum(map(_peak_bytes, (server, *server.children(recursive=True)))))


async def _ask(address: str, bodies: list[dict[str, Any]], concurrency: int) -> list[_Answer]:
    waiting, answers = iter(bodies), list[_Answer]()
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx2.AsyncClient(limits=limits, timeout=LONGEST_SECONDS, headers=headers) as client:

        async def ask_one_after_another() -> None:
            for body in waiting:
                answers.append(await _stream(client, address, body))

        await asyncio.gather(*(ask_one_after_another() for _ in range(concurrency)))
    return answers


async def _stream(client: httpx2.AsyncClient, address: str, body: dict[str, Any]) -> _Answer:
    answer, began = _Answer(), time.perf_counter()
    try:
        async with client.stream("POST", f"{address}/chat/completions", json=body) as response:
            answer.status = response.status_code
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk.get("choices", []):
                    if text := choice["delta"].get("content"):
                        answer.first_seconds = answer.first_seconds or time.perf_counter() - began
                        answer.text += text
                    answer.finished = answer.finished or choice.get("finish_reason") is not None
    except httpx2.HTTPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    answer.seconds = time.perf_counter() - began
    return answer


def _print_table(measured: dict[str, _Measured], options: argparse.Namespace) -> dict[str, bool]:
    with LlamaModel(options.gguf, vocab_only=True) as model:

        def count_tokens(answers: list[_Answer]) -> int:
            return sum(len(model.tokenize(answer.text)) for answer in answers)

        tokens = {engine: [count_tokens(each.whole) for each in one.rounds] for engine, one in measured.items()}
    print(f"{options.requests} requests, {options.concurrency} at once, answers of up to {options.max_tokens} tokens\n")
    print("| engine | requests/s | tokens/s | first token, median | p95 | whole, p95 | peak memory, MiB | dropped |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for engine, one in measured.items():
        rates = [len(each.whole) / each.seconds for each in one.rounds]
        speeds = [count / each.seconds for count, each in zip(tokens[engine], one.rounds, strict=True)]
        firsts = [answer.first_seconds for each in one.rounds for answer in each.whole]
        wholes = [answer.seconds for each in one.rounds for answer in each.whole]
        peak = max(each.peak_bytes for each in one.rounds)
        dropped = sum(len(each.answers) - len(each.whole) for each in one.rounds)
        print(
            f"| {engine} | {statistics.median(rates):.1f} | {statistics.median(speeds):,.0f} "
            f"| {statistics.median(firsts):.2f} s | {_p95(firsts):.2f} s | {_p95(wholes):.2f} s | {peak / MIB:.0f} "
            f"| {dropped} |"
        )
    before, now = (measured[engine].rounds for engine in ENGINES)
    ratios = [old.seconds / new.seconds for old, new in zip(before, now, strict=True)]
    texts = [[{answer.text for answer in each.whole} for each in rounds] for rounds in (before, now)]
    same = len(texts[0][0] & texts[1][0]) / len(texts[0][0] | texts[1][0])
    print(
        f"\n{SERVER} answers {statistics.median(ratios):.2f} times as many requests a second "
        f"({min(ratios):.2f} to {max(ratios):.2f}); of the different answers {100 * same:.0f} % are those of both."
    )
    dropped = sum(len(each.answers) - len(each.whole) for each in now)
    return {
        f"{TIMES_AS_MANY:g} times as many requests a second as {ENGINES[0]}": statistics.median(ratios)
        >= TIMES_AS_MANY,
        f"{SERVER} drops no request of {options.concurrency} at once": dropped == 0,
    }


def _measure_memory(options: argparse.Namespace, bodies: list[dict[str, Any]]) -> dict[str, bool]:
    with _serving(options.gguf, SERVER) as (address, process):
        peaks = [_ask_all(address, process, bodies, options.concurrency).peak_bytes for _ in range(5)]
    shown = " → ".join(f"{peak / MIB:.0f}" for peak in peaks)
    print(f"\nPeak memory of {SERVER} after each of five rounds, MiB: {shown}")
    goal = f"five times the requests take at most {MORE_MEMORY_ALLOWED:g} times the memory"
    return {goal: peaks[-1] <= MORE_MEMORY_ALLOWED * peaks[0]}


def _kill(options: argparse.Namespace, bodies: list[dict[str, Any]]) -> dict[str, bool]:
    """Kill llama-server while it answers; every request has a status in time, and it answers again."""
    with _serving(options.gguf, SERVER) as (address, process):
        [engine] = process.children()

        async def ask_and_kill() -> list[_Answer]:
            asking = asyncio.create_task(_ask(address, bodies, options.concurrency))
            await asyncio.sleep(0.5)
            os.kill(engine.pid, signal.SIGKILL)
            return await asking

        answers = asyncio.run(ask_and_kill())
        killed = time.perf_counter()
        while not asyncio.run(_ask(address, [_SHORT], 1))[0].finished:
            if time.perf_counter() - killed > SECONDS_TO_RESTART:
                return {"a killed llama-server is started again": False}
            time.sleep(0.1)
    statuses = sorted({answer.status for answer in answers})
    cut = sum(answer.status == 200 and not answer.finished for answer in answers)
    refused = sum(answer.status in (502, 503) for answer in answers)
    print(f"\nAfter a kill: {refused} requests answered 502 or 503, {cut} streams end with an error; then it answers.")
    return {"a killed llama-server is started again, and every request has an answer": set(statuses) <= {200, 502, 503}}


def _peak_bytes(process: psutil.Process) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


def _p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.95 * len(values)))] if values else float("nan")


if __name__ == "__main__":
    main()
