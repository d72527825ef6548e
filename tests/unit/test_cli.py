import os
import subprocess
import sys

import pytest
import yaml

from lathe import cli
from lathe.common import paths
from lathe.common.errors import InputError


def printed(capsys, section=None, stage_name=None, overrides=()):
    cli.print_config(section, stage_name, list(overrides))
    return yaml.safe_load(capsys.readouterr().out)


def test_config_prints_parameters_and_the_selected_presets_alone(capsys):
    tree = printed(capsys)
    assert tree["seed"] == 42
    assert tree["models"] == {"tiny": {"source": "builtin"}}
    assert list(tree["datasets"]) == ["commands"]


def test_config_prints_a_section_or_a_key(capsys):
    assert printed(capsys, "lora")["r"] == 16
    assert printed(capsys, "lora.r") == 16


def test_an_override_is_read_as_dvc_reads_it_and_changes_no_file(capsys):
    before = paths.PARAMS.read_text()
    assert printed(capsys, "training.learning_rate", overrides=["training.learning_rate=5e-5"]) == 5e-5
    assert printed(capsys, "quantize.types", overrides=["quantize.types=[Q8_0,Q2_K]"]) == ["Q8_0", "Q2_K"]
    assert printed(capsys, overrides=["dataset=gsm8k-local"])["datasets"]["gsm8k-local"]["prompt"] == "question"
    assert paths.PARAMS.read_text() == before


def test_config_of_a_stage_is_what_dvc_tracks_for_it(capsys):
    tree = printed(capsys, stage_name="preprocess")
    assert set(tree) == {"seed", "preprocess", "training", "datasets"}
    assert tree["training"] == {"max_length": 1024}


def test_config_of_a_training_has_the_parameters_of_its_method(capsys):
    assert "dpo" not in printed(capsys, stage_name="train")
    assert printed(capsys, stage_name="train", overrides=["training.method=dpo"])["dpo"]["beta"] == 1.0


def test_config_of_a_conversion_has_the_preset_of_what_is_converted(capsys):
    assert "datasets" not in printed(capsys, stage_name="convert_base")
    assert {"models", "datasets"} <= set(printed(capsys, stage_name="convert_merged"))
    assert {"models", "datasets"} <= set(printed(capsys, stage_name="fetch"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"section": "lorra"}, "lorra: no such key; did you mean 'lora'?"),
        ({"section": "lora.rank"}, "lora.rank: no such key; "),
        ({"stage_name": "trane"}, "--stage trane: no such stage in dvc.yaml; did you mean 'train'?"),
        ({"overrides": ["lora.rank=4"]}, "-S lora.rank=4: "),
        ({"overrides": ["lora.r=0"]}, "params.yaml: lora.r is 0; must be greater than or equal to 1"),
        ({"overrides": ["lora.r"]}, "-S lora.r: "),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(capsys, arguments, message):
    with pytest.raises(InputError) as caught:
        printed(capsys, **arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = [sys.executable, "-m", "lathe", "schema"]
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "src")}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
