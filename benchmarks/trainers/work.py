"""What each trainer is given to do: the model and its rows, the settings, and where to leave what it measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEED = 1
LEARNING_RATE, WARMUP = 1e-4, 0.1  # peak; share of the steps in which the rate rises

# Shape of Qwen3-0.6B, for random models.
QWEN3_600M = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Settings:
    """One way to train: by what, and how."""

    trainer: str  # lathe, TRL or LLaMA-Factory, or one of the first two followed by " with Liger"
    precision: str = "bf16"  # or fp32
    checkpointing: bool = False  # activations are recomputed in the backward pass
    packing: bool = False
    padding_free: bool = False  # rows end to end; TRL alone, whose rows then see one another without FlashAttention
    compiled: bool = False  # by torch.compile; lathe alone

    @property
    def name(self) -> str:
        """What the tables call it."""
        parts = [
            self.trainer,
            self.precision,
            "checkpointing" * self.checkpointing,
            "packed" * self.packing,
            "padding-free" * self.padding_free,
            "compiled" * self.compiled,
        ]
        return ", ".join(filter(None, parts))

    @property
    def has_liger(self) -> bool:
        """Whether Liger's kernels are used."""
        return self.trainer.endswith("with Liger")


@dataclass(frozen=True)
class Work:
    """A training of `steps` steps on `folder`, which `trainers.materials` has filled; `examples` rows or packs each."""

    settings: Settings
    folder: str
    steps: int
    examples: int
    max_length: int  # of a row, or of a pack (tokens)
    load_in_4bit: bool
    rank: int = 8  # of the LoRA update, which is scaled by 2
    logging_steps: int = 1

    @property
    def alpha(self) -> int:
        """Scale of the update, times its rank."""
        return 2 * self.rank

    @property
    def model(self) -> str:
        """Folder of the base model and its tokenizer."""
        return f"{self.folder}/model"

    def rows(self, form: str) -> str:
        """File with the rows as a trainer wants them: `messages`, `prompt_completion` or `sharegpt`, one a line."""
        return f"{self.folder}/rows/{form}.jsonl"

    def write(self, file: Path) -> None:
        """Write it down for another process."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: str) -> "Work":
        """Read what `write` wrote."""
        fields = json.loads(Path(file).read_text(encoding="utf-8"))
        return cls(**{**fields, "settings": Settings(**fields["settings"])})


def count_operations(shape: dict[str, Any], tokens: int, supervised_tokens: int) -> float:
    """Return the floating-point operations that a step of LoRA needs: 2 per weight and token forward, 2 backward.

    Attention between tokens is not counted.
    """
    heads, head = shape["num_attention_heads"], shape["head_dim"]
    attention = shape["hidden_size"] * head * (2 * heads + 2 * shape["num_key_value_heads"])
    layer = attention + 3 * shape["hidden_size"] * shape["intermediate_size"]
    weights = shape["num_hidden_layers"] * layer
    return 4.0 * (weights * tokens + shape["hidden_size"] * shape["vocab_size"] * supervised_tokens)
