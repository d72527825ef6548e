"""A BERT of two layers with random weights and a vocabulary of its own: a backbone for tests of the classifier."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ACTIONS = {"open": ("open", "raise"), "close": ("close", "shut"), "start": ("start", "boot")}
PLACES = ("hall", "attic", "kitchen", "cellar", "porch", "garage", "study", "loft")
THINGS = ("blind", "gate", "window", "shutter", "door")
OFF_TOPIC = ("what time is it", "tell me a joke", "how far is the moon", "who wrote this song", "is it raining today")


def make_rows() -> list[tuple[str, str]]:
    """Return texts and labels that words alone tell apart."""
    return [
        (f"{verb} the {place} {thing} please", action)
        for action, verbs in ACTIONS.items()
        for verb in verbs
        for place in PLACES
        for thing in THINGS
    ]


def make_backbone(folder: Path, texts: Sequence[str], seed: int = 1, *, causal: bool = False) -> Path:
    """Write the model, or a Llama of that size, and a tokenizer that knows the words of the texts."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if causal else BertModel(BertConfig(**sizes))
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def write_prepared(folder: Path, rows: Sequence[tuple[str, Any]], *, multi_label: bool = False) -> Path:
    """Write splits as the stage prepare does: every fifth row to validation, the one after it to test."""
    from lathe.classify.labels import collect_labels
    from lathe.common.jsonl import write_jsonl

    folder.mkdir(parents=True)
    made = [{"text": text, "labels": [label] if isinstance(label, str) else list(label)} for text, label in rows]
    splits = {
        "train": [row for number, row in enumerate(made) if number % 5 > 1],
        "validation": made[::5],
        "test": made[1::5],
    }
    for name, of_split in splits.items():
        write_jsonl(of_split, folder / f"{name}.jsonl")
    collect_labels((row["labels"] for row in splits["train"]), multi_label=multi_label).write(folder)
    return folder


def write_csv(file: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write texts and labels as CSV."""
    lines = ["text,label", *(f"{json.dumps(text)},{label}" for text, label in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
