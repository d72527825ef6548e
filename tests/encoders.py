"""An encoder for BERTScore, small and random: BERT's shape with pieces of single letters."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_encoder(folder: Path) -> Path:
    """Fill the folder with config.json, model.safetensors and the tokenizer: three layers, 64 tokens."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = BertTokenizerFast(vocab=ids, model_max_length=64)
    assert tokenizer.tokenize("ab c") == ["a", "##b", "c"]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder
