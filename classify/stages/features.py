"""Compute what the frozen backbone makes of every text, once for all experiments on the head.

reads   classify/models/backbone/, classify/data/prepared/, classify/params.yaml: model.pooling, model.normalize,
        data.max_length, features
writes  classify/data/features/{train,validation,test}.safetensors and backbone.json, classify/metrics/features.json
"""

import logging
import time

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, metric_files, paths
from lathe.config.classifier_config import ClassifierConfig
from lathe.data.split_files import SPLITS


def main(config: ClassifierConfig) -> stage.Throughput:
    from lathe.classify import backbone, features, freeze_proof
    from lathe.classify.labels import read_split
    from lathe.classify.model import Architecture, Classifier

    params, folder = config.params, paths.CLASSIFIER / "models/backbone"
    backbone.check_length(folder, params.data.max_length)
    import torch

    tokenizer = backbone.load_tokenizer(folder)
    frozen = backbone.load_backbone(folder).requires_grad_(False)
    classifier = Classifier(frozen, torch.nn.Identity(), Architecture.of(params)).eval()
    if torch.cuda.is_available():
        classifier.to("cuda")
    report, started, count = [], time.perf_counter(), 0
    with paths.replace_folder(paths.CLASSIFIER / "data/features") as out:
        features.write_digests(out, freeze_proof.hash_backbone(frozen).frozen)
        for split in SPLITS:
            texts, _ = read_split(paths.CLASSIFIER / "data/prepared", split)
            tokens = backbone.tokenize(tokenizer, texts, params.data.max_length)
            made = features.compute_features(
                classifier,
                tokens,
                padding=tokenizer.pad_token_id,
                batch_size=params.features.batch_size,
                task=f"features of {split}",
            )
            features.save_features(out, split, made)
            report.append({"split": split, "width": made.shape[1], **features.describe_lengths(tokens)})
            count += len(texts)
    seconds = time.perf_counter() - started
    json_files.write_json(paths.CLASSIFIER_METRICS / "features.json", metric_files.wrap_in_list({"splits": report}))
    for part in report:
        if part["cut"]:
            logging.getLogger("lathe.features").warning(
                "%s: %d of %d texts are longer than data.max_length %d and were cut; raise it if their ends matter",
                part["split"],
                part["cut"],
                part["texts"],
                params.data.max_length,
            )
    return {"texts_per_second": round(count / seconds, 1)}


if __name__ == "__main__":
    stage.run_classifier(main)
