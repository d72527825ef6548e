"""What each trainer is given to do: the model and its rows, the settings, and where to leave what it measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

RANK, ALPHA, SEED = 8, 16, 1
LEARNING_RATE, WARMUP = 1e-4, 0.1  # peak; share of the steps in which the rate rises


@dataclass(frozen=True)
class Settings:
    """One way to train: by what, and how."""

    trainer: str  # lathe, TRL, TRL with Liger or LLaMA-Factory
    precision: str = "bf16"  # or fp32
    checkpointing: bool = False  # activations are recomputed in the backward pass
    packing: bool = False

    @property
    def name(self) -> str:
        """What the tables call it."""
        parts = [self.trainer, self.precision, "checkpointing" * self.checkpointing, "packed" * self.packing]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Work:
    """A training of `steps` steps on `folder`, which `trainers.materials` has filled; `examples` rows or packs each."""

    settings: Settings
    folder: str
    steps: int
    examples: int
    max_length: int  # of a row, or of a pack (tokens)
    load_in_4bit: bool

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
