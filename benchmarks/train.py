"""Speed and memory of lathe's training against plain TRL's, on the same rows, model and adapter.

python benchmarks/train.py [--rounds 2] [--models qwen3,tiny] [--steps N] [--only NAME] [--folder DIR]

Makes two random models in a temporary folder: one of Qwen3's shape with its vocabulary of 151,936 (hidden 512, 8
layers) and a tiny one (hidden 256, 3 layers, 512 entries). Each is trained for a few steps (LoRA on all linear layers,
a third of each row supervised) by `lathe.training.sft.train`, unpacked and packed, and by TRL's `SFTTrainer`: unpacked
and packed, with its defaults (bf16, gradient checkpointing, which it turns on by itself) and without checkpointing.
Each runs in a fresh process, in turn, in every round. Unpacked and packed steps have about as many tokens.

Prints a Markdown table: supervised tokens per second of the steps after the first two, their share of the rate at which
this machine multiplies bf16 matrices (forward, backward through the activations, and output layer where it is needed;
what a tool computes beyond that does not count), peak resident memory, and seconds from the start of the process to
the end of the first step. The losses of equal steps must agree.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine

RANK, SEED = 8, 1
MIB = 1 << 20


@dataclass(frozen=True)
class _Case:
    """A model and how it is trained; `rows` per step of at most `longest` tokens."""

    title: str
    shape: dict[str, int]
    longest: int
    rows: int
    steps: int


CASES = {
    "qwen3": _Case(
        "Qwen3's shape, hidden 512, 8 layers, vocabulary 151,936",
        {
            "vocab_size": 151_936,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
        },
        longest=256,
        rows=4,
        steps=6,
    ),
    "tiny": _Case(
        "tiny, hidden 256, 3 layers, vocabulary 512",
        {
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        longest=96,
        rows=32,
        steps=20,
    ),
}

# name -> tool, packing, gradient checkpointing
TOOLS = {
    "lathe": ("lathe", False, False),
    "lathe, packed": ("lathe", True, False),
    "lathe, checkpointing": ("lathe", False, True),
    "TRL, its defaults": ("trl", False, True),
    "TRL, its defaults, packed": ("trl", True, True),
    "TRL, no checkpointing": ("trl", False, False),
    "TRL, no checkpointing, packed": ("trl", True, False),
}


@dataclass(frozen=True)
class _Run:
    supervised_tokens_per_second: float
    share_of_peak: float
    peak_bytes: int
    first_step_seconds: float
    losses: list[float]


def main() -> None:
    """Make the models, run everything in turn, print the tables."""
    arguments = _arguments()
    if arguments.child:
        case = CASES[arguments.case]
        case = replace(case, steps=arguments.steps or case.steps)
        _run_child(arguments.child, case, arguments.folder, arguments.peak, arguments.started)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-train-") as name:
        for case in arguments.models.split(","):
            folder = Path(name) / case
            folder.mkdir()
            _run_apart("make", case, folder, arguments.steps)
            peaks = []
            runs: dict[str, list[_Run]] = {tool: [] for tool in TOOLS if tool in (arguments.only or TOOLS)}
            for turn in range(arguments.rounds):
                peaks.append(float(_run_apart("peak", case, folder, arguments.steps)))
                for tool in list(runs) if turn % 2 == 0 else reversed(list(runs)):
                    measured = _run_apart(tool, case, folder, arguments.steps, peak=max(peaks))
                    runs[tool].append(_Run(**json.loads(measured)))
            sys.stdout.write(_report(CASES[case], runs, max(peaks)))
            sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (default 2)")
    parser.add_argument("--models", default=",".join(CASES), help="which models, by commas (default all)")
    parser.add_argument("--steps", type=int, help="steps of each run, at least 3 (default: 6 and 20)")
    parser.add_argument("--only", action="append", choices=TOOLS, help="only this one; may be given several times")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    for hidden in ("--child", "--case"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_apart(child: str, case: str, folder: Path, steps: int | None, peak: float = 0.0) -> str:
    """Run one step in a fresh process; return the last line that it wrote."""
    command = [sys.executable, __file__, "--child", child, "--case", case, "--folder", str(folder)]
    command += ["--peak", str(peak), "--started", str(time.time())]
    command += ["--steps", str(steps)] if steps else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout.splitlines()[-1]


def _run_child(child: str, case: _Case, folder: Path, peak: float, started: float) -> None:
    if child == "make":
        _make_model(case, folder / "model")
        sys.stdout.write("made\n")
        return
    if child == "peak":
        sys.stdout.write(f"{_bf16_rate()}\n")
        return
    tool, packing, checkpointing = TOOLS[child]
    train = _train_with_lathe if tool == "lathe" else _train_with_trl
    steps = train(case, folder, packing, checkpointing)
    timed = [step for step in steps if step.number > 2]
    seconds = timed[-1].ended - steps[1].ended
    supervised = sum(step.supervised_tokens for step in timed)
    operations = sum(_operations(case, step) for step in timed)
    run = _Run(
        supervised_tokens_per_second=supervised / seconds,
        share_of_peak=operations / seconds / peak,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        first_step_seconds=steps[0].ended - started,
        losses=[step.loss for step in steps],
    )
    sys.stdout.write("\n" + json.dumps(run.__dict__) + "\n")


@dataclass
class _Step:
    number: int
    ended: float
    tokens: int
    supervised_tokens: int
    loss: float = float("nan")


def _recorder(steps: list[_Step], counted: dict[str, int]) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(_Step(state.global_step, time.time(), counted.pop("tokens"), counted.pop("supervised")))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                steps[-1].loss = logs["loss"]

    return Recorder()


def _count(trainer: Any, counted: dict[str, int]) -> None:
    """Have the tokens of every batch counted, by what the tool's own collator makes of it."""
    collate = trainer.data_collator

    def counting(examples: list[dict[str, Any]]) -> Any:
        counted["tokens"] = sum(len(example["input_ids"]) for example in examples)
        counted["supervised"] = sum(label != -100 for example in examples for label in example["labels"])
        return collate(examples)

    trainer.data_collator = counting


def _train_with_lathe(case: _Case, folder: Path, packing: bool, checkpointing: bool) -> list[_Step]:
    import lathe.training.sft as sft
    from lathe.params import Lora, Quantization, load

    steps: list[_Step] = []
    counted: dict[str, int] = {}

    class Measured(sft.AnswerTrainer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            _count(self, counted)
            self.add_callback(_recorder(steps, counted))

    sft.AnswerTrainer = Measured  # type: ignore[misc]
    sft.load_tokenizer = lambda _folder: _make_tokenizer()  # rows are ids already
    sft._encode = lambda _tokenizer, rows, _supervise: rows
    params = load().params
    training = params.training.model_copy(
        update={
            "packing": packing,
            "max_length": _max_length(case),
            "max_steps": case.steps,
            "per_device_train_batch_size": _examples(case, packing),
            "per_device_eval_batch_size": 1,
            "gradient_checkpointing": checkpointing,
            "precision": "bf16",
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "eval_steps": 1000,
            "gradient_accumulation_steps": 1,
        }
    )
    lora = Lora.model_validate({**params.lora.model_dump(), "r": RANK, "lora_alpha": 2 * RANK})
    quantization = Quantization.model_validate({**params.quantization.model_dump(), "load_in_4bit": False})
    rows = _rows(case)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        adapter = Path(out) / "adapter"
        adapter.mkdir()
        sft.train(
            folder / "model",
            {"train": rows, "validation": rows[:1]},
            adapter,
            Path(out) / "metrics",
            seed=SEED,
            training=training,
            lora=lora,
            quantization=quantization,
            supervise="all",
        )
    return steps


def _train_with_trl(case: _Case, folder: Path, packing: bool, checkpointing: bool) -> list[_Step]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = _rows(case)
    labels = [
        [token if kept else -100 for token, kept in zip(row.input_ids, row.supervised, strict=True)] for row in rows
    ]
    data = Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": labels})
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    config = SFTConfig(
        output_dir=str(folder / "unused"),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=SEED,
        data_seed=SEED,
        max_steps=case.steps,
        per_device_train_batch_size=_examples(case, packing),
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=1,
        max_length=_max_length(case),
        packing=packing,
        gradient_checkpointing=checkpointing,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    steps: list[_Step] = []
    counted: dict[str, int] = {}
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, peft_config=lora, processing_class=_make_tokenizer()
    )
    _count(trainer, counted)
    trainer.add_callback(_recorder(steps, counted))
    trainer.train()
    return steps


def _max_length(case: _Case) -> int:
    """A pack is as long as all rows of an unpacked step may be on average, so that both steps have equal work."""
    return case.longest * case.rows * 5 // 8 // _examples(case, packing=True)


def _examples(case: _Case, packing: bool) -> int:
    return 2 if packing else case.rows


def _rows(case: _Case) -> list[Any]:
    """Rows of a quarter to the whole of the longest length, evenly spread; the last third is supervised."""
    import random

    from lathe.template import Encoded

    chance = random.Random(SEED)
    rows = []
    for index in range(case.rows * case.steps * 2):
        length = chance.randint(case.longest // 4, case.longest)
        ids = [chance.randrange(3, case.shape["vocab_size"]) for _ in range(length)]
        rows.append(Encoded(index, ids, [place >= length - length // 3 for place in range(length)]))
    return rows


def _make_model(case: _Case, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(**case.shape, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _make_tokenizer() -> Any:
    """A tokenizer that is never asked to tokenise: the rows are ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def _operations(case: _Case, step: _Step) -> float:
    """Floating-point operations that a step needs: 2 per weight and token forward, 2 backward (frozen weights)."""
    shape = case.shape
    heads, head = shape["num_attention_heads"], shape["head_dim"]
    attention = shape["hidden_size"] * head * (2 * heads + 2 * shape["num_key_value_heads"])
    layer = attention + 3 * shape["hidden_size"] * shape["intermediate_size"]
    weights = shape["num_hidden_layers"] * layer
    return 4.0 * (weights * step.tokens + shape["hidden_size"] * shape["vocab_size"] * step.supervised_tokens)


def _bf16_rate() -> float:
    """The best rate of bf16 matrix products seen here, in operations per second."""
    import torch

    size = 2048
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _report(case: _Case, runs: dict[str, list[_Run]], peak: float) -> str:
    def median(tool: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs[tool])

    def ratio(tool: str) -> str:
        if "lathe" not in runs:
            return ""
        pairs = [
            ours.supervised_tokens_per_second / theirs.supervised_tokens_per_second
            for ours, theirs in zip(runs["lathe"], runs[tool], strict=True)
        ]
        return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"

    lines = [
        f"A random model: {case.title}; rows of {case.longest // 4} to {case.longest} tokens, {case.rows} in a step.",
        f"Machine: {machine.describe()}; bf16 products at {peak / 1e9:.0f} GFLOP/s.",
        "",
        "| | supervised tokens/s | lathe / this (range) | share of bf16 rate | peak, MiB | first step, s | last loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tool in runs:
        lines.append(
            f"| {tool} | {median(tool, 'supervised_tokens_per_second'):.0f} | {ratio(tool)} "
            f"| {100 * median(tool, 'share_of_peak'):.0f} % | {median(tool, 'peak_bytes') / MIB:.0f} "
            f"| {median(tool, 'first_step_seconds'):.1f} | {runs[tool][-1].losses[-1]:.3f} |"
        )
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    main()
