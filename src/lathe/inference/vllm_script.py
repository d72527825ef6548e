"""Greedy answers by vLLM to prompts given as token ids.

It is run by the Python of vLLM's own environment, `python vllm_script.py FOLDER`, and imports nothing of Lathe.

reads   FOLDER/request.json (model, max_model_len, stop_token_ids, options of vllm.LLM),
        FOLDER/prompts.jsonl ([number, token ids, most tokens of the answer] a line)
writes  FOLDER/answers.jsonl ([number, token ids, reason] a line; the reason is stop or length), batch by batch
"""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROWS_AT_ONCE = 1024  # given to vLLM together, which chooses how many of them it decodes at once


def main(folder: Path) -> None:
    """Answer all prompts of a folder."""
    from vllm import LLM, SamplingParams

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    model = LLM(
        model=request["model"],
        max_model_len=request["max_model_len"],
        seed=0,
        trust_remote_code=False,
        generation_config="vllm",  # no penalty that the model's own file asks for
        **request["options"],
    )
    with (folder / "answers.jsonl").open("a", encoding="utf-8") as answers:
        for rows in _read_batches(folder / "prompts.jsonl"):
            params = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=max_tokens,
                    stop_token_ids=request["stop_token_ids"],
                    detokenize=False,
                )
                for _, _, max_tokens in rows
            ]
            prompts = [{"prompt_token_ids": tokens} for _, tokens, _ in rows]
            for (number, _, _), output in zip(rows, model.generate(prompts, params, use_tqdm=False), strict=True):
                [answer] = output.outputs
                answers.write(json.dumps([number, list(answer.token_ids), answer.finish_reason]) + "\n")
            answers.flush()


def _read_batches(file: Path) -> Iterator[list[Any]]:
    with file.open(encoding="utf-8") as lines:
        while batch := [json.loads(line) for line in islice(lines, ROWS_AT_ONCE)]:
            yield batch


if __name__ == "__main__":
    main(Path(sys.argv[1]))
