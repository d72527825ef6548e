"""Turn raw rows into validated chat messages, split into train, validation and test.

reads   data/raw/, models/base/ (tokenizer), params.yaml: seed, preprocess, training.max_length; the dataset's preset
writes  data/processed/{train,validation,test}.jsonl, metrics/preprocess/report.json
"""

import _path  # noqa: F401

from lathe import model_folder, paths, stage, track
from lathe.params import Config


def main(config: Config) -> None:
    model_folder.check_length(paths.MODEL_BASE, config.params.training.max_length)

    from lathe.data import prepare
    from lathe.jsonl import write_jsonl
    from lathe.model import load_tokenizer

    settings = config.params.preprocess
    prepared = prepare(
        paths.DATA_RAW,
        config.dataset,
        tokenizer=load_tokenizer(paths.MODEL_BASE),
        max_length=config.params.training.max_length,
        seed=config.params.seed,
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        max_dropped_fraction=settings.max_dropped_fraction,
        supervise=settings.supervise,
    )
    with paths.whole_folder(paths.DATA_PROCESSED) as folder:
        for split, rows in prepared.splits.items():
            write_jsonl(rows, folder / f"{split}.jsonl")
    track.write_json(paths.METRICS / "preprocess/report.json", prepared.report)


if __name__ == "__main__":
    stage.run(main)
