"""Refusals before a process is started: unknown launchers, and configurations that accelerate does not take."""

import shutil

import pytest
from conftest import changed
from refusals import refused
from toy import load_toy

from lathe.common import launch, paths
from lathe.training.zero import check_zero

CONFIGS = sorted((paths.ROOT / launch.CONFIGS).glob("*.yaml"))


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """Return a function that puts cpu-2.yaml, changed, into a checkout, and gives the launcher that names it."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    folder = tmp_path / launch.CONFIGS
    shutil.copytree(CONFIGS[0].parent, folder)

    def make(old: str, new: str, name: str = "cpu-2.yaml") -> str:
        text = (folder / name).read_text()
        assert old in text
        (folder / "mine.yaml").write_text(text.replace(old, new))
        return f"accelerate launch --config_file {launch.CONFIGS}/mine.yaml"

    return make


@pytest.mark.parametrize(
    ("launcher", "code", "part"),
    [
        ("torchrun --nproc 2", "launcher-unknown", "'torchrun --nproc 2'"),
        ("accelerate launch", "launcher-without-config", "'accelerate launch'"),
        ("accelerate launch --config_file", "launcher-without-config", "--config_file'"),
        ("accelerate launch --config_file 'ddp", "launcher-refused", "No closing quotation"),
        ("accelerate launch --config_file /etc/ddp.yaml", "launcher-config-outside", "/etc/ddp.yaml"),
        (
            "accelerate launch --config_file experiments/accelerate/none.yaml",
            "launcher-config-missing",
            "none.yaml: no such file; experiments/accelerate has cpu-2.yaml, ddp",
        ),
        (
            "accelerate launch --config_file experiments/accelerate/cpu-2.yaml other.py",
            "launcher-names-program",
            "other.py'",
        ),
        (
            "accelerate launch --config_file experiments/accelerate/cpu-2.yaml --num_processes two",
            "launcher-refused",
            "invalid int value: 'two'",
        ),
        (
            "accelerate launch --config_file experiments/accelerate/cpu-2.yaml --num_processes 1",
            "launcher-process-count",
            "num_processes is 1",
        ),
    ],
)
def test_a_launcher_that_cannot_be_started_is_refused(launcher, code, part):
    with refused(code, part) as caught:
        launch.run(launcher, "stages/train.py")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "code", "part"),
    [
        ("num_processes: 2", "num_proceses: 2", "launcher-config-invalid", "num_proceses"),
        ("distributed_type: MULTI_CPU", "distributed_type: MANY", "launcher-config-invalid", "MANY"),
        (
            "distributed_type: MULTI_CPU",
            "distributed_type: MEGATRON_LM",
            "launcher-distributed-type",
            "MEGATRON_LM; must be MULTI_GPU",
        ),
        ("distributed_type: MULTI_CPU", "distributed_type: FSDP", "launcher-fsdp-version", "fsdp_version"),
        (
            "mixed_precision: 'no'",
            "mixed_precision: bf16",
            "launcher-mixed-precision",
            "'bf16'; training.precision decides",
        ),
        ("num_machines: 1", "num_machines: 3", "launcher-process-count", "on 3 machine(s)"),
        ("num_machines: 1", "num_machines: [", "launcher-config-invalid", "no configuration of accelerate"),
        (
            "use_cpu: true",
            "use_cpu: false\ngpu_ids: all",
            "launcher-gpu-count",
            "needs 2 GPUs on this machine, torch sees 1",
        ),
    ],
)
def test_a_configuration_that_would_not_train_rightly_is_refused(configuration, old, new, code, part, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with refused(code, part, "experiments/accelerate/mine.yaml") as caught:
        launch.run(configuration(old, new), "stages/train.py")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "code", "part"),
    [
        ("zero_stage: 3", "zero_stage: 1", "launcher-zero-stage", "zero_stage is 1; must be 2 or 3"),
        ("zero_stage: 3", "deepspeed_config_file: mine.json", "launcher-deepspeed-file", "mine.json"),
        ("offload_param_device: none", "offload_param_device: cpu", "launcher-offload", "offload_param_device is cpu"),
        ("zero3_init_flag: false", "zero3_init_flag: true", "launcher-zero3-init", "set false"),
        ("gradient_clipping: auto", "gradient_clipping: 1.0", "launcher-deepspeed-auto", "gradient_clipping is 1.0"),
        ("use_cpu: false", "use_cpu: true", "launcher-cpu", "on GPUs alone"),
        ("num_machines: 1", "num_machines: 2", "launcher-deepspeed-machines", "set standard"),
        ("zero_stage: 3", "zero_stage: 3", "deepspeed-missing", "make setup EXTRAS=deepspeed"),
    ],
)
def test_a_configuration_of_deepspeed_that_would_not_train_rightly_is_refused(
    configuration, old, new, code, part, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(code, part, "experiments/accelerate/mine.yaml") as caught:
        launch.run(configuration(old, new, "zero3.yaml"), "stages/train.py")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"training.method": "grpo"}, "zero-method"),
        ({"training.precision": "fp16"}, "zero-fp16"),
        ({"training.optim": "adafactor"}, "zero-optimizer"),
    ],
)
def test_what_zero_would_train_otherwise_is_refused(changes, code, monkeypatch):
    monkeypatch.setattr("lathe.common.launch.get_zero_stage", lambda: 3)
    with refused(code, *changes):
        check_zero(changed(load_toy().params, changes))


def test_a_machine_that_the_configuration_does_not_count_is_refused():
    with refused("machine-rank-out-of-range", "--machine_rank 1: ", "cpu-2.yaml has 1 machine"):
        launch.run(f"accelerate launch --config_file {launch.CONFIGS}/cpu-2.yaml", "stages/train.py", machine_rank=1)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_takes_every_configuration_that_is_shipped(file, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    if "zero" in file.name:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    launcher = f"accelerate launch --config_file {launch.CONFIGS}/{file.name}"
    machine = 1 if "machines" in file.name else None
    read, _, _ = _validate_launch_command(launch._parse_launcher(launcher, "stages/train.py", machine))
    assert read.num_processes == (16 if machine else 2)
    assert read.machine_rank == (machine or 0)
    assert read.use_fsdp == ("fsdp" in file.name)
    assert read.use_deepspeed == ("zero" in file.name)
    assert read.multi_gpu == (not read.use_fsdp and not read.use_deepspeed)
    if read.use_deepspeed:
        read.deepspeed_fields_from_accelerate_config = ""  # which launch_command sets
        command, environment = prepare_deepspeed_cmd_env(read)
        assert command is None  # torch's launcher, in this process
        if machine:
            assert (read.nnodes, read.nproc_per_node, read.node_rank) == ("2", "8", 1)
            assert read.rdzv_endpoint == "10.0.0.1:29500"
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == file.stem[len("zero")]
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
        assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
        assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert not read.use_fsdp or read.fsdp_version == 2
