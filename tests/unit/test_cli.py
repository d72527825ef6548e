import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from refusals import refused

from lathe import cli
from lathe.commands import general
from lathe.common import paths

pytestmark = pytest.mark.usefixtures("toy_params")


def printed(capsys, section=None, stage_name=None, overrides=()):
    general.print_config(section, stage_name, list(overrides))
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
    assert set(tree) == {"seed", "preprocess", "training", "convert", "evaluate", "datasets"}
    assert set(tree["evaluate"]) == {"cluster_by"}
    assert "tokenizer_parity" in tree["convert"]
    assert tree["training"] == {"max_length": 1024}


def test_config_of_a_training_has_the_parameters_of_its_method(capsys):
    assert "dpo" not in printed(capsys, stage_name="train")
    assert printed(capsys, stage_name="train", overrides=["training.method=dpo"])["dpo"]["beta"] == 1.0


def test_config_of_a_conversion_has_the_preset_of_what_is_converted(capsys):
    assert "datasets" not in printed(capsys, stage_name="convert_base")
    assert {"models", "datasets"} <= set(printed(capsys, stage_name="convert_merged"))
    assert {"models", "datasets"} <= set(printed(capsys, stage_name="fetch"))


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ({"section": "lorra"}, "unknown-key", ["lorra: ", "did you mean 'lora'?"]),
        ({"section": "lora.rank"}, "unknown-key", ["lora.rank: "]),
        ({"stage_name": "trane"}, "unknown-stage", ["--stage trane: ", "did you mean 'train'?"]),
        ({"overrides": ["lora.rank=4"]}, "unknown-key", ["-S lora.rank=4: ", "did you mean 'lora.r'?"]),
        ({"overrides": ["lora.r=0"]}, "invalid-value", ["params.yaml: lora.r is 0"]),
        ({"overrides": ["lora.r"]}, "unreadable-override", ["-S lora.r: "]),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(capsys, arguments, code, parts):
    with refused(code, *parts) as caught:
        printed(capsys, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("action", "code", "part"),
    [
        (lambda: general.inspect_rows("train", 0, None, ids=False), "number-too-small", "--rows 0"),
        (lambda: general.inspect_rows("train", 3, -1, ids=False), "number-too-small", "--row -1"),
        (lambda: general.answer_file(Path("no.jsonl"), None, None), "missing-file", "--file no.jsonl"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(action, code, part):
    with refused(code, part):
        action()


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = [sys.executable, "-m", "lathe", "schema"]
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "src")}
    with subprocess.Popen(
        command, cwd=paths.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize("name", sorted(cli.EXAMPLES))
def test_the_help_of_each_command_has_a_sentence_and_an_example_that_it_takes(name, capsys):
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args([name, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"usage: .*lathe {name} .*[A-Z].+\. ", printed)
    example = cli.EXAMPLES[name]
    assert f"Example: {example}" in printed
    if not example.startswith("eval"):
        _, *words = shlex.split(example)
        assert cli.build_parser().parse_args(words)


def test_every_command_has_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["--help"])
    listed = re.findall(r"^    ([a-z-]+)\b", capsys.readouterr().out, re.MULTILINE)
    assert set(listed) == set(cli.EXAMPLES)
