"""Blank examples, which let several processes take the last batch of an epoch together without reading a row twice.

accelerate gives every process as many batches of the same size, and begins anew with the first rows where an epoch has
none left for some: these would count twice in that step's loss, and in an evaluation. A blank example is one token
without a label: it adds nothing to loss, gradient or token counts.
"""

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from lathe.training.loss import IGNORED

BLANK = {"input_ids": [0], "labels": [IGNORED], "seq_lengths": [1]}


def filled(examples: Dataset, multiple: int) -> Dataset:
    """Return the examples, and behind them as many blank ones as make their number a multiple of `multiple`."""
    missing = -len(examples) % multiple
    if not missing:
        return examples
    blank = {name: [BLANK[name]] * missing for name in examples.column_names}
    return concatenate_datasets([examples, Dataset.from_dict(blank, features=examples.features)])


def without_blanks(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a batch's real examples; one blank where there is nothing else, as a forward pass needs something."""
    # A real one has at least a token that predicts and a token that is predicted.
    return [example for example in examples if len(example["input_ids"]) > 1] or examples[:1]


class BlanksLast(Sampler[int]):
    """The order of an epoch: the first `real` examples as one process would shuffle them, the blank ones behind."""

    def __init__(self, examples: Dataset, real: int, seed: int) -> None:
        super().__init__()
        self.shuffled = SeedableRandomSampler(range(real), data_seed=seed)
        self.blanks = range(real, len(examples))

    def __iter__(self) -> Iterator[int]:
        yield from self.shuffled
        yield from self.blanks

    def __len__(self) -> int:
        return len(self.shuffled) + len(self.blanks)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch, counted from 0."""
        self.shuffled.set_epoch(epoch)
