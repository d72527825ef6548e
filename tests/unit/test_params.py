import re
import shutil
from pathlib import Path

import pytest
from dvc.utils.serialize import load_yaml
from pydantic.fields import FieldInfo

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config import base, params, reference, yaml_files
from lathe.config.load import load


@pytest.fixture
def refused(tmp_path):
    """Return a function that edits a copy of params.yaml (or presets.yaml) and gives the lines of the refusal."""

    def refuse(old: str, new: str, file: str = "params.yaml") -> list[str]:
        for name in ("params.yaml", "presets.yaml"):
            shutil.copy(paths.ROOT / name, tmp_path / name)
        text = (tmp_path / file).read_text()
        assert old in text, old
        (tmp_path / file).write_text(text.replace(old, new, 1))
        with pytest.raises(InputError) as caught:
            load(tmp_path / "params.yaml", tmp_path / "presets.yaml")
        return str(caught.value).splitlines()

    return refuse


def test_the_committed_files_are_valid():
    config = load()
    assert config.params.model == "tiny"
    assert config.dataset.source == "builtin"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    - rouge_l",
            "    - rouge_1\n    - rouge_1",
            "evaluate.metrics: lists rouge_1 twice; name each metric once",
        ),
        (
            "    - rouge_l",
            "    - bert_score",
            "evaluate.metrics lists bert_score, but bert_score.model is null; name an encoder there, a folder under "
            "models/local or a repository of the hub, or take bert_score off the list",
        ),
        (
            "answer_pattern: null",
            "answer_pattern: '#### (\\S+'",
            "evaluate.answer_pattern: pattern '#### (\\\\S+' is not a regular expression: missing ), unterminated "
            "subpattern at position 5",
        ),
        (
            "answer_pattern: null",
            "answer_pattern: '####'",
            "evaluate.answer_pattern: pattern '####' has no group; put parentheses around the answer",
        ),
        (
            "primary_metric: exact_match",
            "primary_metric: exact_mach",
            "evaluate.primary_metric is 'exact_mach', which is not computed; did you mean 'exact_match'?",
        ),
        (
            "primary_metric: exact_match",
            "primary_metric: judge",
            "evaluate.primary_metric is 'judge', which is not computed; set judge.enabled to true",
        ),
        (
            "merged.exact_match > base.exact_match",
            "merged.exact_match => 0.5",
            "evaluate.gates: 'merged.exact_match => 0.5' is not a comparison of scores: cannot read '=> 0.5'; write "
            "sums of numbers, ARTIFACT.SCORE and NUMBER * ARTIFACT.SCORE on both sides, such as 'Q4_K_M.exact_match >= "
            "merged.exact_match - 0.03'",
        ),
        (
            "merged.exact_match > base.exact_match",
            "Q8_1.exact_match > 0.5",
            "evaluate.gates: 'Q8_1.exact_match > 0.5' names Q8_1, which is no artifact; did you mean 'Q8_0'?",
        ),
        (
            "merged.exact_match > base.exact_match",
            "merged.chrf > 50",
            "evaluate.gates: 'merged.chrf > 50' names chrf, which is not computed; add it to evaluate.metrics",
        ),
        (
            "bert_score: # BERTScore",
            "bert_score:\n  model: /encoders/mine\nunused: # BERTScore",
            "bert_score.model: '/encoders/mine' is neither a folder under models/local nor a repository; write "
            "OWNER/NAME",
        ),
    ],
)
def test_what_is_asked_of_the_scores_is_checked_before_anything_runs(refused, old, new, message):
    assert f"params.yaml: {message}" in refused(old, new)


def test_the_judge_and_bert_score_add_their_scores():
    def scores(**changes):
        tree = load().params.model_dump()
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
    ("old", "new", "message"),
    [
        ("seed: 42", "sed: 42", "sed is not a known key; did you mean 'seed'?"),
        ("seed: 42", "seed: null", "seed is null; must be integer"),
        ("seed: 42", "seed: true", "seed is True; must be integer"),
        ("seed: 42", "seed: -1", "seed is -1; must be greater than or equal to 0"),
        (
            "    experiment_name: lathe",
            "    experiment_nam: lathe",
            "tracking.mlflow.experiment_nam is not a known key; did you mean 'experiment_name'?",
        ),
        ("  mlflow: #", "  mlflo: #", "tracking.mlflo is not a known key; did you mean 'mlflow'?"),
        (
            "    - name: json_fields",
            "    - nam: json_fields",
            "grpo.rewards.1.nam is not a known key; did you mean 'name'?",
        ),
        (
            "tracking_uri: http://127.0.0.1:5000",
            "tracking_uri: http://me:secret@mlflow.example",
            "tracking.mlflow.tracking_uri: 'http:…mlflow.example' is not a plain address; write http(s)://HOST[:PORT]"
            "[/PATH], and put keys into the environment",
        ),
        ("  r: 16", "  r: 1.5", "lora.r is 1.5; must be integer"),
        ("  r: 16", "  r: '16'", "lora.r is '16'; must be integer"),
        (
            "max_grad_norm: 1.0",
            "max_grad_norm: .nan",
            "training.max_grad_norm is nan; must be a finite number",
        ),
        ("max_steps: null", "max_steps: 0", "training.max_steps is 0; must be greater than or equal to 1"),
        (
            "lr_scheduler_type: cosine",
            "lr_scheduler_type: cosin",
            "training.lr_scheduler_type is 'cosin'; must be one of linear, cosine, cosine_with_restarts, polynomial, "
            "constant, constant_with_warmup, inverse_sqrt; did you mean 'cosine'?",
        ),
        (
            "target_modules: all-linear",
            "target_modules: 5",
            "lora.target_modules is 5; must be string or list",
        ),
        (
            "target_modules: all-linear",
            "target_modules: []",
            "lora.target_modules is []; must have at least 1 item",
        ),
        ("- Q4_1", "- q4_0", "quantize.types: 'q4_0' is no quantization type; did you mean 'Q4_0'?"),
        ("- Q4_1", "- Q8_0", "quantize: types lists Q8_0 twice; name each type once"),
        ("tuning: lora", "tuning: full", "training.tuning is 'full'; 4-bit weights cannot be trained; set"),
        (
            "launcher: python",
            "launcher: torchrun",
            "training.launcher: 'torchrun' is no launcher; write python, or accelerate",
        ),
        (
            "label_smoothing: 0.0",
            "label_smoothing: 0.1",
            "dpo: dpo.label_smoothing is 0.1, which the loss apo_zero does not use; set it to 0, or dpo.loss_type to",
        ),
        (
            "num_generations: 8",
            "num_generations: 7",
            "grpo: grpo.per_device_train_batch_size x grpo.gradient_accumulation_steps is 256; must be a multiple",
        ),
        ("name: exact_match", "name: exactmatch", "grpo.rewards.0.name is 'exactmatch'; must be one of exact_match,"),
        ("name: exact_match", "name: regex", "grpo.rewards.0: the reward regex needs pattern; add it"),
        (
            "name: exact_match",
            "name: regex\n      pattern: '('",
            "grpo.rewards.0: pattern '(' is not a regular expression: missing ), unterminated subpattern",
        ),
        (
            "name: exact_match",
            "name: numeric\n      pattern: '#### '",
            "grpo.rewards.0: pattern '#### ' has no group; put parentheses around the number",
        ),
        (
            "name: exact_match",
            "name: function\n      function: brevity",
            "grpo.rewards.0: function is 'brevity'; write MODULE:FUNCTION, such as 'example:brevity'",
        ),
        (
            "name: exact_match",
            "name: length\n      min_characters: 9\n      max_characters: 3",
            "grpo.rewards.0: min_characters 9 is above max_characters 3",
        ),
        (
            "name: exact_match",
            "name: json_valid\n      pattern: x",
            "grpo.rewards.0: the reward json_valid takes no pattern",
        ),
        (
            "model: tiny",
            "model: tyni",
            "model is 'tyni'; must be a name under models in presets.yaml; did you mean 'tiny'?",
        ),
        (
            "dataset: commands",
            "dataset: comands",
            "dataset is 'comands'; must be a name under datasets in presets.yaml; did you mean 'commands'?",
        ),
    ],
)
def test_a_bad_value_is_refused_with_key_value_rule_and_remedy(refused, old, new, message):
    assert any(line.startswith(f"params.yaml: {message}") for line in refused(old, new))


def test_all_problems_of_both_files_are_reported_at_once(refused):
    lines = refused("seed: 42", "seed: x\nmodle: tiny")
    assert "params.yaml: seed is 'x'; must be integer" in lines
    assert "params.yaml: modle is not a known key; did you mean 'model'?" in lines
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "source: builtin",
            "source: magic",
            "presets.yaml: models.tiny.source is 'magic'; must be one of builtin, local, hub",
        ),
        (
            "id: Qwen/Qwen3-0.6B",
            "id: Qwen Qwen3-0.6B",
            "presets.yaml: models.qwen3-600m.id: 'Qwen Qwen3-0.6B' is not a repository; write OWNER/NAME as on the "
            "hub, such as 'Qwen/Qwen3-0.6B'",
        ),
        (
            "train_split: train",
            "train_split: train[5%:100]",
            "presets.yaml: datasets.gsm8k.train_split: 'train[5%:100]' is neither a split nor a slice of one; write "
            "'train', 'train[:1000]', or 'train[5%:10%]'",
        ),
        (
            "train_split: train",
            "train_spilt: train",
            "presets.yaml: datasets.gsm8k.train_spilt is not a known key; did you mean 'train_split'?",
        ),
        (
            "prompt: question",
            "promt: question",
            "presets.yaml: datasets.gsm8k-local.promt is not a known key; did you mean 'prompt'?",
        ),
        (
            "completion: answer",
            "messages: answer",
            "presets.yaml: datasets.gsm8k-local: messages excludes prompt, completion and prompt_template; "
            "keep one of the two ways",
        ),
    ],
)
def test_a_bad_preset_is_refused(refused, old, new, message):
    assert message in refused(old, new, file="presets.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "params.yaml:2: not valid YAML: "),
        ("seed: 1\nseed: 2\n", 'params.yaml:2: not valid YAML: found duplicate key "seed"'),
        ("a: \x00", "params.yaml: not valid YAML"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        load(tmp_path / "params.yaml", paths.PRESETS)


def test_what_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(InputError, match="byte 6 is not UTF-8"):
        load(tmp_path / "params.yaml", paths.PRESETS)


@pytest.mark.parametrize("value", ["5e-05", "1e3", "1_000", "010", "yes", "~", "12:30", ".inf", "+.5", "2020-01-01"])
def test_yaml_is_read_as_dvc_reads_it(tmp_path, value):
    file = tmp_path / "params.yaml"
    file.write_text(f"key: {value}\n")
    assert yaml_files.read_yaml(file) == load_yaml(str(file))


def test_an_override_written_by_dvc_in_scientific_notation_is_a_number(tmp_path):
    text = paths.PARAMS.read_text().replace("learning_rate: 0.006", "learning_rate: 5e-05")
    (tmp_path / "params.yaml").write_text(text)
    assert load(tmp_path / "params.yaml").params.training.learning_rate == 5e-05


def leaves(section: type[base.Section], parents: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], FieldInfo]]:
    """The keys that hold a value, in sections and in sections within them, each with its path."""
    found: list[tuple[tuple[str, ...], FieldInfo]] = []
    for key, field in section.model_fields.items():
        kind, path = field.annotation, (*parents, key)
        if isinstance(kind, type) and issubclass(kind, base.Section):
            found += leaves(kind, path)
        else:
            found.append((path, field))
    return found


def test_every_key_of_params_yaml_carries_its_documented_meaning_and_unit():
    lines = paths.PARAMS.read_text().splitlines()
    for path, described in leaves(params.Params):
        *parents, key = path
        written = [line for line in lines if re.match(rf"{'  ' * len(parents)}{key}:", line)]
        assert any(line.endswith(f" # {reference.comment(described)}") for line in written), (path, written)


def test_the_parameter_page_is_what_the_schema_prints():
    assert Path(paths.ROOT / "docs/params.md").read_text() == reference.markdown()


def test_every_key_is_read_by_the_code():
    code = "".join(
        file.read_text()
        for folder in ("stages", "src/lathe")
        for file in sorted((paths.ROOT / folder).rglob("*.py"))
        if file.name not in {"params.py", "schema.py"}
    )
    for path, _ in leaves(params.Params):
        assert re.search(rf"\.{path[-1]}\b", code), f"{'.'.join(path)} is never read"
