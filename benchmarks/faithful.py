"""How far each model that the pipeline makes is from the one that was trained: KL divergence, and whole answers.

python benchmarks/faithful.py [--rows 64] [--answers 200]

Takes what the pipeline left in this checkout: models/base, models/adapter, models/merged, every models/gguf/*.gguf,
and the first rows of data/processed/validation.jsonl. transformers computes in float32, on the weights that each model
really has: the base in its 16 bits, and in 4 bits (which params.yaml may train on), the merged weights as they are
stored.
llama.cpp computes as it does for `generate`. Counted are the supervised tokens alone, each given all true ones before
it.

Prints a Markdown table: of each model against its reference, the mean of KL(reference || model) in nats per token and
its 99th percentile, and the share of tokens at which both rank the same one first. Then the greedy answers of
transformers, with the merged weights, and of merged-f16.gguf to `--answers` prompts (validation, test, then training):
how many are the same, and of every other one where they part, and by how much transformers prefers its own token there.
"""

import argparse
import gc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from numpy.typing import NDArray

from lathe.commands.general import choose_generation_sizes
from lathe.common import paths
from lathe.common.jsonl import read_jsonl
from lathe.config import training_params
from lathe.config.load import load
from lathe.gguf.llama_model import LlamaModel
from lathe.inference.generate import Generator
from lathe.inference.generation_sizes import HELD_OUT
from lathe.inference.kv_cache import KVCache
from lathe.models.answer_split import split_answer
from lathe.models.loading import load_base
from lathe.models.loss_mask import Encoded, encode
from lathe.models.model_folder import read_untrained_names
from lathe.models.tokenizer import load_tokenizer

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Distance:
    """How far a model is from its reference, over `tokens` of them: KL in nats per token, and top-1 agreement."""

    tokens: int
    mean: float
    percentile_99: float
    same_first: float
    median: float


def main() -> None:
    """Run every model over the same rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows of the validation split to run over (default 64)")
    parser.add_argument("--answers", type=int, default=200, help="prompts to answer with both (default 200)")
    chosen = parser.parse_args()
    count = chosen.rows
    for folder in (paths.MODEL_BASE, paths.MODEL_ADAPTER, paths.MODEL_MERGED, paths.GGUF, paths.DATA_PROCESSED):
        if not folder.is_dir():
            raise SystemExit(f"error: {folder}: no such folder; run the pipeline first: make repro")
    rows = _rows(count)
    print(f"{machine.describe()}; {len(rows)} validation rows, {sum(map(_count, rows))} supervised tokens\n")
    print("| model | against | mean KL, nats/token | 99 % of tokens below | same first token |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, reference, distance in _distances(rows):
        print(
            f"| {name} | {reference} | {distance.mean:.1e} | {distance.percentile_99:.1e} | "
            f"{100 * distance.same_first:.1f} % |",
            flush=True,
        )
    print("\n".join(("", *_describe_answers(chosen.answers))))


def distance(reference: Iterable[Logits], model: Iterable[Logits]) -> Distance:
    """Compare logits of the same tokens, (tokens, vocabulary) for each row."""
    divergences, same = [], []
    for expected, given in zip(reference, model, strict=True):
        p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (expected, given))
        divergences.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    nats = torch.cat(divergences)
    return Distance(
        len(nats),
        float(nats.mean()),
        float(nats.quantile(0.99)),
        float(torch.cat(same).double().mean()),
        float(nats.median()),
    )


@dataclass(frozen=True)
class Answer:
    """A greedy answer of transformers: its tokens, and by how many nats each is likelier than the next best."""

    token_ids: Sequence[int]
    margins: Sequence[float]


def answer_by_transformers(model: Any, tokenizer: Any, prompt_ids: Sequence[int], *, max_new_tokens: int) -> Answer:
    """Return the greedy answer to a prompt, without the token that ends it."""
    made = model.generate(
        torch.tensor([prompt_ids]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(made.logits).float().log_softmax(-1).topk(2).values
    token_ids = made.sequences[0, len(prompt_ids) :].tolist()
    if token_ids[-1] == tokenizer.eos_token_id:
        token_ids.pop()
    return Answer(token_ids, (best[:, 0] - best[:, 1]).tolist())


def of_transformers(model: Any, rows: Sequence[Encoded]) -> Iterator[Logits]:
    """Yield a model's logits where a supervised token of the row is predicted."""
    model.eval()
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids]), logits_to_keep=_columns(row)).logits[0]
        yield logits.float().numpy()


def of_gguf(path: Path, rows: Sequence[Encoded], *, threads: int) -> Iterator[Logits]:
    """Yield the same of a GGUF file, by llama.cpp."""
    longest = max(len(row.input_ids) for row in rows)
    with (
        LlamaModel(path) as model,
        KVCache(model, slots=1, length=longest, max_outputs=longest, threads=threads, min_rows=2) as cache,
    ):
        for row in rows:
            cache.cut(0, 0)
            first = int(_columns(row)[0])
            logits = []
            while cache.length(0) < len(row.input_ids):
                logits.append(cache.feed(0, row.input_ids, first_output=first).copy())
            yield np.concatenate(logits)[_columns(row).numpy() - first]


def _rows(count: int) -> Sequence[Encoded]:
    config = load().params
    rows = itertools.islice(read_jsonl(paths.DATA_PROCESSED / "validation.jsonl"), count)
    tokenizer = load_tokenizer(paths.MODEL_BASE)
    return encode(
        tokenizer,
        [row["messages"] for row in rows],
        supervise=config.preprocess.supervise,
        tools=[row.get("tools") for row in rows],
    )


def _count(row: Encoded) -> int:
    return sum(row.supervised)


def _columns(row: Encoded) -> torch.Tensor:
    # The token at n is predicted at n - 1.
    return torch.tensor(row.supervised).nonzero()[:, 0] - 1


def _distances(rows: Sequence[Encoded]) -> Iterator[tuple[str, str, Distance]]:
    threads = torch.get_num_threads()
    quantization = load().params.quantization
    in_16_bit = quantization.model_copy(update={"load_in_4bit": False})
    merged = list(of_transformers(load_base(paths.MODEL_MERGED, in_16_bit, precision="fp32"), rows))
    base = list(of_transformers(load_base(paths.MODEL_BASE, in_16_bit, precision="fp32"), rows))
    if read_untrained_names(paths.MODEL_ADAPTER) is None:
        trained = list(of_transformers(_adapted(quantization), rows))
        name = "4-bit base + adapter" if quantization.load_in_4bit else "base + adapter"
        if quantization.load_in_4bit:
            exact = list(of_transformers(_adapted(in_16_bit), rows))
            yield "16-bit base + adapter", name, distance(trained, exact)
            yield "merged", "16-bit base + adapter", distance(exact, merged)
        else:
            in_4_bit = quantization.model_copy(update={"load_in_4bit": True})
            yield "4-bit base + adapter", name, distance(trained, of_transformers(_adapted(in_4_bit), rows))
        yield "merged", name, distance(trained, merged)
        yield "base", name, distance(trained, base)
    else:
        yield "base", "merged", distance(merged, base)
    for file in sorted(paths.GGUF.glob("*.gguf"), key=lambda file: -file.stat().st_size):
        reference, logits = ("base", base) if file.name.startswith("base-") else ("merged", merged)
        yield file.name, reference, distance(logits, of_gguf(file, rows, threads=threads))


def _describe_answers(count: int) -> Iterator[str]:
    """Yield lines: how many answers of transformers and of the f16 GGUF are the same, and where any other parts."""
    params, sizes = load().params, choose_generation_sizes()
    files = [paths.DATA_PROCESSED / f"{split}.jsonl" for split in (*HELD_OUT, "train")]
    rows = list(itertools.islice((row for file in files if file.is_file() for row in read_jsonl(file)), count))
    tokenizer = load_tokenizer(paths.MODEL_MERGED)
    in_16_bit = params.quantization.model_copy(update={"load_in_4bit": False})
    model = load_base(paths.MODEL_MERGED, in_16_bit, precision="fp32").eval()
    with Generator(
        paths.GGUF / "merged-f16.gguf",
        n_parallel=params.generate.n_parallel,
        n_ctx=sizes.n_ctx,
        threads=torch.get_num_threads(),
    ) as generator:
        prompts = [split_answer(generator.chat_template, row["messages"], row.get("tools")).prompt for row in rows]
        shipped = generator.complete(prompts, max_new_tokens=sizes.max_new_tokens)
        prompt_ids = [generator.tokenize(prompt) for prompt in prompts]
    lines = []
    for number, (ids, completion) in enumerate(zip(prompt_ids, shipped, strict=True), 1):
        answer = answer_by_transformers(model, tokenizer, ids, max_new_tokens=sizes.max_new_tokens)
        if tokenizer.decode(answer.token_ids, skip_special_tokens=True) == completion.text:
            continue
        lengths = range(1, len(answer.token_ids) + 1)
        same = sum(completion.text.startswith(tokenizer.decode(answer.token_ids[:length])) for length in lengths)
        lines.append(
            f"row {number} parts at token {same + 1} of {len(answer.token_ids) + 1}, "
            f"where transformers prefers its own by {answer.margins[same]:.4f} nats"
        )
    yield f"{len(rows) - len(lines)} of {len(rows)} greedy answers of merged-f16.gguf are those of transformers"
    yield from lines


def _adapted(quantization: training_params.Quantization) -> Any:
    from peft import PeftModel

    gc.collect()
    base = load_base(paths.MODEL_BASE, quantization, precision="fp32")
    return PeftModel.from_pretrained(base, paths.MODEL_ADAPTER)


if __name__ == "__main__":
    main()
