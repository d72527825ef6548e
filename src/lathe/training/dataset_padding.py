"""Dataset padding: empty examples that let several processes share the last batch of an epoch.

accelerate gives every process the same number of batches of the same size. Where an epoch has none left for some, it
starts again with the first examples, which would count twice in that step's loss, and in an evaluation. A padding
example is one token without a label: it adds nothing to loss, gradient or token counts.
"""

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from lathe.training.loss import IGNORE_INDEX

PADDING_EXAMPLE = {"input_ids": [0], "labels": [IGNORE_INDEX], "seq_lengths": [1]}


def pad_dataset(dataset: Dataset, multiple: int) -> Dataset:
    """Append padding examples until the length is a multiple of `multiple`."""
    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    padding = {name: [PADDING_EXAMPLE[name]] * missing for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(padding, features=dataset.features)])


def drop_padding(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a batch without padding; one padding example if there is nothing else, as a forward pass needs a token."""
    # A real example has at least a token that predicts and a token that is predicted.
    return [example for example in examples if len(example["input_ids"]) > 1] or examples[:1]


class PaddingLastSampler(Sampler[int]):
    """The order of an epoch: the first `examples` shuffled as one process would shuffle them, then the padding."""

    def __init__(self, dataset: Dataset, examples: int, seed: int) -> None:
        super().__init__()
        self.shuffled = SeedableRandomSampler(range(examples), data_seed=seed)
        self.padding = range(examples, len(dataset))

    def __iter__(self) -> Iterator[int]:
        yield from self.shuffled
        yield from self.padding

    def __len__(self) -> int:
        return len(self.shuffled) + len(self.padding)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch, counted from 0."""
        self.shuffled.set_epoch(epoch)
