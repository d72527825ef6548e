"""Which changes of the classifier's parameters are one factor, and which are several."""

import pytest

from lathe.experiments.classifier_comparison import PRESETS, TOGETHER
from lathe.experiments.factors import group_factors


@pytest.mark.parametrize(
    ("changed", "factors"),
    [
        (["model.hidden_dim"], 1),
        (["model.hidden_dim", "model.dropout"], 2),
        (["training.tuning", "training.freeze_backbone"], 1),
        (["training.tuning", "training.freeze_backbone", "training.encoder_learning_rate"], 1),
        (["training.tuning", "training.freeze_backbone", "training.epochs"], 2),
        (["dataset", "datasets.path", "datasets.prompt"], 1),
        (["model.backbone", "models.package", "model.pooling"], 2),
        (["lora.r", "lora.lora_alpha"], 1),
        (["seed"], 0),
        ([], 0),
    ],
)
def test_keys_that_must_change_together_are_one_factor_and_a_seed_is_none(changed, factors):
    assert len(group_factors(dict.fromkeys(changed, (1, 2)), TOGETHER, PRESETS)) == factors
