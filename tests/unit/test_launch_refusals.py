"""What is refused before a process is started: launchers that are none, configurations that are not accelerate's."""

import shutil

import pytest

from lathe.common import launch, paths
from lathe.common.errors import InputError

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
    ("launcher", "problem"),
    [
        ("torchrun --nproc 2", "no launcher that is known"),
        ("accelerate launch", "it names no configuration"),
        ("accelerate launch --config_file", "it names no configuration"),
        ("accelerate launch --config_file 'ddp", "No closing quotation"),
        ("accelerate launch --config_file /etc/ddp.yaml", "lies outside experiments/accelerate"),
        ("accelerate launch --config_file experiments/accelerate/none.yaml", "no such file; .* has cpu-2.yaml, ddp"),
        ("accelerate launch --config_file experiments/accelerate/cpu-2.yaml other.py", "it names a program"),
        ("accelerate launch --config_file experiments/accelerate/cpu-2.yaml --num_processes two", "invalid int value"),
        ("accelerate launch --config_file experiments/accelerate/cpu-2.yaml --num_processes 1", "must be at least 2"),
    ],
)
def test_a_launcher_that_cannot_be_started_is_refused(launcher, problem):
    with pytest.raises(InputError, match=problem) as caught:
        launch.run(launcher, "stages/train.py")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("num_processes: 2", "num_proceses: 2", "unknown keys"),
        ("distributed_type: MULTI_CPU", "distributed_type: MANY", "MANY"),
        ("distributed_type: MULTI_CPU", "distributed_type: DEEPSPEED", "must be MULTI_GPU, MULTI_CPU or FSDP"),
        ("distributed_type: MULTI_CPU", "distributed_type: FSDP", "fsdp_version is not 2"),
        ("mixed_precision: 'no'", "mixed_precision: bf16", "training.precision decides"),
        ("num_machines: 1", "num_machines: 3", "the same on each"),
        ("num_machines: 1", "num_machines: [", "no configuration of accelerate"),
        ("use_cpu: true", "use_cpu: false\ngpu_ids: all", "needs 2 GPUs on this machine, torch sees"),
    ],
)
def test_a_configuration_that_would_not_train_rightly_is_refused(configuration, old, new, problem, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match=problem) as caught:
        launch.run(configuration(old, new), "stages/train.py")
    assert "experiments/accelerate/mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_machine_that_the_configuration_does_not_count_is_refused():
    with pytest.raises(InputError, match=r"--machine_rank 1: .*cpu-2.yaml has 1 machine"):
        launch.run(f"accelerate launch --config_file {launch.CONFIGS}/cpu-2.yaml", "stages/train.py", machine_rank=1)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_takes_every_configuration_that_is_shipped(file, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    from accelerate.commands.launch import _validate_launch_command

    launcher = f"accelerate launch --config_file {launch.CONFIGS}/{file.name}"
    machine = 1 if "machines" in file.name else None
    read, _, _ = _validate_launch_command(launch._accelerate_arguments(launcher, "stages/train.py", machine))
    assert read.num_processes == (16 if machine else 2)
    assert read.machine_rank == (machine or 0)
    assert read.use_fsdp == ("fsdp" in file.name)
    assert read.multi_gpu == ("fsdp" not in file.name)
    assert not read.use_fsdp or read.fsdp_version == 2
