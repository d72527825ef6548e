"""Weights in fp8, or in 4 bits by AWQ, written as compressed-tensors by llmcompressor: what vLLM loads.

It is run by the Python of llmcompressor's own environment, and imports nothing of Lathe:

    python -m lathe.export.compress fp8|awq MODEL OUT ROWS

ROWS is a JSON file with lists of token ids, which awq is calibrated with.
fp8 needs no data: the scales of weights are theirs alone, and those of activations are found as they come.
"""

import json
import sys
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 512  # of calibration rows in one pass
GROUP_SIZES = (128, 64, 32)  # weights that share a scale: those that vLLM has kernels for


def main(name: str, merged: str, out: str, rows_file: str) -> None:
    """Quantize a model and save it."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    recipe = build_recipe(name, list_columns(model))
    if name == "fp8":
        oneshot(model=model, recipe=recipe)
    else:
        import torch
        from llmcompressor.pipelines.cache import IntermediatesCache
        from torch.utils.data import DataLoader

        if not torch.accelerator.is_available():  # to which AWQ would have pinned memory copied
            IntermediatesCache.pin_memory = lambda *_, **__: None
        blocks = join_rows(json.loads(Path(rows_file).read_text(encoding="utf-8")))
        batches: Any = [
            {"input_ids": torch.tensor([block]), "attention_mask": torch.ones(1, len(block), dtype=torch.long)}
            for block in blocks
        ]
        loader: Any = DataLoader(batches, batch_size=None, shuffle=False)
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(merged),
            recipe=recipe,
            dataset=loader,
            num_calibration_samples=len(blocks),
            max_seq_length=max(map(len, blocks)),
            pipeline="sequential",
        )
    model.save_pretrained(out, save_compressed=True)


def build_recipe(name: str, columns: list[int]) -> list[Any]:
    """Return llmcompressor's modifiers for linear layers with so many inputs; the output head stays as it is."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if name == "fp8":
        return [QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=["lm_head"])]
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=choose_group_size(columns)
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def join_rows(rows: list[list[int]]) -> list[list[int]]:
    """Return rows one after another in blocks of up to BLOCK_TOKENS, as AWQ's authors calibrate; a row is never cut."""
    blocks: list[list[int]] = []
    for row in rows:
        if blocks and len(blocks[-1]) + len(row) <= BLOCK_TOKENS:
            blocks[-1].extend(row)
        else:
            blocks.append(list(row))
    return blocks


def list_columns(model: Any) -> list[int]:
    """Return the number of inputs of each linear layer but the output head."""
    from torch import nn

    return [
        module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    ]


def choose_group_size(columns: list[int]) -> int:
    """Return the largest size of a group that all rows of the weights divide into."""
    for size in GROUP_SIZES:
        if all(number % size == 0 for number in columns):
            return size
    raise SystemExit(f"awq: rows of {min(columns)} weights divide into no groups of {GROUP_SIZES[-1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
