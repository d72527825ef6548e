"""The default pipeline against the same job by hand: plain TRL, PEFT, llama.cpp's programs and a loop of answers.

python benchmarks/by_hand.py [--steps N] [--folder DIR]

Clones this checkout's last commit and runs its whole pipeline there, as its user does; then does the same in plain
scripts, each in a fresh process: `SFTTrainer` with the settings of params.yaml and its defaults for all else, PEFT's
merge, `convert_hf_to_gguf.py`, `llama-quantize` (built by `make llama-server`), and greedy answers of the same files to
the same held-out rows by `llama_cpp.Llama`. The scripts start from the rows and the base model that the pipeline has
fetched, and check nothing: no digests, no estimate, no tokenizer, no importance matrix, no lineage, no report. Then one
type of `quantize.types` is changed and the pipeline runs again; whoever has no pipeline runs the scripts again, or
remembers which of them that change concerns, which is a line of its own. Prints Markdown tables.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

from lathe.common import paths
from lathe.common.jsonl import read_jsonl
from lathe.gguf.build_llama_server import QUANTIZE, find_program

HELD_OUT = ("validation", "test")
BEFORE, AFTER = "Q4_K_M", "Q5_K_M"  # the type that is changed
SECOND_RUN_GOAL = 10  # times as fast as the job by hand


def main() -> None:
    """Run both, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of both trainings (default: as params.yaml says)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--child", choices=("train", "merge", "answer"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        {"train": _train, "merge": _merge, "answer": _answer}[arguments.child](*map(Path, arguments.rest))
        return
    if find_program(QUANTIZE) is None:
        raise SystemExit(f"error: {QUANTIZE} is not built; run: make llama-server")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-by-hand-") as name:
        clone, hand = Path(name) / "lathe", Path(name) / "hand"
        hand.mkdir()
        _make_clone(clone, arguments.steps)
        first = _time([sys.executable, "-m", "lathe", "repro"], clone)
        stages = {
            file.stem: sum(one["seconds"] for one in json.loads(file.read_text(encoding="utf-8")))
            for file in (clone / "metrics/timings").glob("*.json")
        }
        by_hand = _do_by_hand(clone, hand)
        scores = _read_scores(clone), {name: _score(clone, hand / f"{name}.jsonl") for name in _list_answers(BEFORE)}
        _change_type(clone)
        second = _time([sys.executable, "-m", "lathe", "repro"], clone)
        changed = _quantize_and_answer(clone, hand, AFTER)
        _print(first, stages, by_hand, scores, second, changed, arguments.steps)


def _make_clone(clone: Path, steps: int | None) -> None:
    subprocess.run(["git", "clone", "--quiet", str(paths.ROOT), str(clone)], check=True)
    (clone / ".llama.cpp").symlink_to(paths.LLAMA_CPP)
    if steps:
        _edit(clone / "params.yaml", r"(?m)^(  max_steps:)(?= # number of steps to stop after)", rf"\1 {steps}")


def _change_type(clone: Path) -> None:
    _edit(clone / "params.yaml", rf"(?m)^(  - ){BEFORE}$", rf"\g<1>{AFTER}")


def _edit(file: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, file.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"error: {file}: {count} places for {pattern}; the benchmark is for the committed parameters")
    file.write_text(text, encoding="utf-8")


def _do_by_hand(clone: Path, hand: Path) -> dict[str, float]:
    """Do all that the pipeline has done; return the seconds of each step."""
    base, adapter, merged = clone / "models/base", hand / "adapter", hand / "merged"
    converter = [sys.executable, str(paths.LLAMA_CPP / "convert_hf_to_gguf.py"), "--outtype", "f16", "--outfile"]
    child = [sys.executable, __file__, "--child"]
    seconds = {
        "train": _time([*child, "train", str(clone), str(adapter)], clone),
        "merge": _time([*child, "merge", str(base), str(adapter), str(merged)], clone),
        "convert (2)": _time([*converter, str(hand / "base.gguf"), str(base)], clone)
        + _time([*converter, str(hand / "merged.gguf"), str(merged)], clone),
    }
    answers = [("base", "0"), ("base", "4"), ("merged", "0")]
    seconds["answers of base, few-shot and merged"] = sum(
        _time([*child, "answer", str(clone), str(hand / f"{file}.gguf"), _answers(hand, file, shots), shots], clone)
        for file, shots in answers
    )
    for name in ("Q8_0", BEFORE):
        seconds[f"{name}: quantize, answers"] = _quantize_and_answer(clone, hand, name)
    return seconds


def _quantize_and_answer(clone: Path, hand: Path, name: str) -> float:
    program, file = str(find_program(QUANTIZE)), hand / f"{name}.gguf"
    quantize = _time([program, str(hand / "merged.gguf"), str(file), name, str(os.cpu_count())], clone)
    command = [sys.executable, __file__, "--child", "answer", str(clone), str(file), _answers(hand, name, "0"), "0"]
    return quantize + _time(command, clone)


def _answers(hand: Path, file: str, shots: str) -> str:
    return str(hand / f"{file}{'_few_shot' if shots != '0' else ''}.jsonl")


def _list_answers(name: str) -> tuple[str, ...]:
    return "base", "base_few_shot", "merged", "Q8_0", name


def _time(command: list[str], folder: Path) -> float:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder / "src")}
    print(f"{' '.join(command[1:5])} …", file=sys.stderr, flush=True)
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def _load_params(clone: Path) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load((clone / "params.yaml").read_text(encoding="utf-8"))


def _train(clone: Path, adapter: Path) -> None:
    """Train as params.yaml says, by TRL with its defaults for what params.yaml does not say."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    params, base = _load_params(clone), clone / "models/base"
    training, lora = params["training"], params["lora"]

    def read(split: str) -> Dataset:
        rows = [row["messages"] for row in read_jsonl(clone / f"data/processed/{split}.jsonl")]
        return Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows])

    config = SFTConfig(
        output_dir=str(adapter.with_name("checkpoints")),
        use_cpu=True,
        bf16=True,
        report_to=[],
        seed=params["seed"],
        max_steps=training["max_steps"] or -1,
        num_train_epochs=training["num_train_epochs"],
        per_device_train_batch_size=training["per_device_train_batch_size"],
        per_device_eval_batch_size=training["per_device_eval_batch_size"],
        learning_rate=training["learning_rate"],
        lr_scheduler_type=training["lr_scheduler_type"],
        warmup_ratio=training["warmup_ratio"],
        max_length=training["max_length"],
        gradient_checkpointing=training["gradient_checkpointing"],
        logging_steps=training["logging_steps"],
        eval_strategy="steps",
        eval_steps=training["eval_steps"],
        save_steps=training["save_steps"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    layers = AutoConfig.from_pretrained(base).num_hidden_layers
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        args=config,
        train_dataset=read("train"),
        eval_dataset=read("validation"),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=lora["r"],
            lora_alpha=lora["lora_alpha"],
            target_modules=lora["target_modules"],
            layers_to_transform=list(range(layers - (lora["num_layers"] or layers), layers)),
        ),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    trainer.save_model(str(adapter))


def _merge(base: Path, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def _answer(clone: Path, file: Path, out: Path, shots: Path) -> None:
    """Answer the held-out rows one by one, greedily, after `shots` training rows as examples."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=2048, n_threads=os.cpu_count(), verbose=False)
    rows = [row["messages"] for split in HELD_OUT for row in read_jsonl(clone / f"data/processed/{split}.jsonl")]
    examples = [row["messages"] for row in read_jsonl(clone / "data/processed/train.jsonl")[: int(str(shots))]]
    shown = [message for messages in examples for message in messages if message["role"] != "system"]
    longest = max(len(model.tokenize(messages[-1]["content"].encode(), add_bos=False)) for messages in rows)
    with out.open("w", encoding="utf-8") as lines:
        for messages in rows:
            system = [message for message in messages[:1] if message["role"] == "system"]
            asked = [*system, *shown, *messages[len(system) : -1]]
            answer = model.create_chat_completion(asked, temperature=0.0, max_tokens=longest * 5 // 4)
            text = answer["choices"][0]["message"]["content"]
            lines.write(json.dumps({"answer": text, "reference": messages[-1]["content"]}) + "\n")


def _score(clone: Path, file: Path) -> float:
    """Return the share of the rows of test whose answer is the reference."""
    rows = read_jsonl(file)[-len(read_jsonl(clone / "data/processed/test.jsonl")) :]
    return sum(row["answer"].strip() == row["reference"].strip() for row in rows) / len(rows)


def _read_scores(clone: Path) -> dict[str, float]:
    """Return exact_match on test of each file, as the pipeline has scored it."""
    scores = json.loads((clone / "metrics/evaluate/test.json").read_text(encoding="utf-8"))[0]
    return {name: scores[name]["exact_match"] for name in _list_answers(BEFORE)}


def _print(
    first: float,
    stages: dict[str, float],
    by_hand: dict[str, float],
    scores: tuple[dict[str, float], dict[str, float]],
    second: float,
    changed: float,
    steps: int | None,
) -> None:
    total = sum(by_hand.values())
    print(f"{machine.describe()}; {f'{steps} steps of training' if steps else 'as params.yaml says'}; one run\n")
    print("| | pipeline, seconds | by hand, seconds | by hand / pipeline |\n| --- | ---: | ---: | ---: |")
    for name, seconds in by_hand.items():
        own = stages.get(name.split(" ")[0]) if name in ("train", "merge", "convert (2)") else None
        cells = f"{own:.0f} | {seconds:.0f} | {seconds / own:.2f}" if own else f" | {seconds:.0f} | "
        print(f"| {name} | {cells} |")
    print(f"| generate (all answers) | {stages['generate']:.0f} | | |")
    print(f"| everything, the first time | {first:.0f} | {total:.0f} | {total / first:.2f} |")
    print(f"| again, {AFTER} in place of {BEFORE} | {second:.0f} | {total:.0f} | {total / second:.2f} |")
    print(f"| the same, where one knows what it concerns | {second:.0f} | {changed:.0f} | {changed / second:.2f} |")
    print("\n| exact match on test | pipeline | by hand |\n| --- | ---: | ---: |")
    print(
        "\n".join(f"| {name} | {100 * scores[0][name]:.0f} % | {100 * scores[1][name]:.0f} % |" for name in scores[0])
    )
    met = "met" if total / second >= SECOND_RUN_GOAL else "NOT MET"
    print(f"\n- {met}: the second run is {total / second:.1f} times as fast as the scripts (goal: {SECOND_RUN_GOAL})")
    print(f"- {'met' if first <= total else 'NOT MET'}: the first run takes no longer than the scripts")


if __name__ == "__main__":
    main()
