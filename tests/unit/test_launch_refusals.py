"""Refusals before a process is started: unknown launchers, and configurations that accelerate does not take."""

import shutil

import pytest
from refusals import refused

from lathe.common import launch, paths

CONFIGS = sorted((paths.ROOT / launch.CONFIGS).glob("*.yaml"))


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """Return a function that puts cpu-2.yaml, changed, into a checkout, and gives the launcher that names it."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    folder = tmp_path / launch.CONFIGS
    shutil.copytree(CONFIGS[0].parent, folder)

    def make(old: str, new: str) -> str:
        text = (folder / "cpu-2.yaml").read_text()
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
            "distributed_type: DEEPSPEED",
            "launcher-distributed-type",
            "DEEPSPEED; must be MULTI_GPU",
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


def test_a_machine_that_the_configuration_does_not_count_is_refused():
    with refused("machine-rank-out-of-range", "--machine_rank 1: ", "cpu-2.yaml has 1 machine"):
        launch.run(f"accelerate launch --config_file {launch.CONFIGS}/cpu-2.yaml", "stages/train.py", machine_rank=1)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_takes_every_configuration_that_is_shipped(file, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    from accelerate.commands.launch import _validate_launch_command

    launcher = f"accelerate launch --config_file {launch.CONFIGS}/{file.name}"
    machine = 1 if "machines" in file.name else None
    read, _, _ = _validate_launch_command(launch._parse_launcher(launcher, "stages/train.py", machine))
    assert read.num_processes == (16 if machine else 2)
    assert read.machine_rank == (machine or 0)
    assert read.use_fsdp == ("fsdp" in file.name)
    assert read.multi_gpu == ("fsdp" not in file.name)
    assert not read.use_fsdp or read.fsdp_version == 2
