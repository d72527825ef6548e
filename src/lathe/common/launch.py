"""Several processes: accelerate's own launcher, run within this very process, and what its workers tell it.

No shell and no PATH stand between: DVC starts the script, the script starts accelerate's launcher in its own process,
and that starts the workers, the same script once per rank. A worker says nothing of how it ends; it writes that down,
and the launcher says it once, however many workers have the same to say.
"""

import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lathe.common import paths
from lathe.common.errors import InputError, Interrupted

CONFIGS = Path("experiments/accelerate")  # below the checkout; the train stage depends on this folder
REMEDY = "write python, or accelerate launch --config_file experiments/accelerate/NAME.yaml"
TOLD_BY_TORCH = "TORCHELASTIC_ERROR_FILE"  # set for workers alone: where one writes why it failed
SPEEDS = "speeds.json"  # rank 0's, beside that file
INTERRUPTED = "interrupted; run the same command again"
FORWARDED = (signal.SIGINT, signal.SIGTERM)


def is_worker() -> bool:
    """Tell whether a launcher started this process, so that it works and does not launch."""
    return TOLD_BY_TORCH in os.environ


def is_needed(launcher: str, machine_rank: int | None) -> bool:
    """Tell whether this process is to start those that work. Raises InputError where only one machine works."""
    if launcher == "python" and machine_rank is not None:
        raise InputError(f"--machine_rank {machine_rank}: training.launcher is 'python', for one process; {REMEDY}")
    return launcher != "python" and not is_worker()


def is_main() -> bool:
    """Tell whether this process writes and logs: rank 0, or the only one."""
    return not is_worker() or os.environ["RANK"] == "0"


def is_sharded() -> bool:
    """Tell whether each process holds a share of every weight (FSDP)."""
    return is_worker() and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def tell(message: str, code: int) -> NoReturn:
    """End this worker with that exit code, and let the launcher say why."""
    content = json.dumps({"message": message, "timestamp": time.time()})
    Path(os.environ[TOLD_BY_TORCH]).write_text(content, encoding="utf-8")
    sys.exit(code)


def hand_over(speeds: dict[str, float]) -> None:
    """Give what this worker measured to the launcher, which alone knows the seconds of the whole."""
    Path(os.environ[TOLD_BY_TORCH]).with_name(SPEEDS).write_text(json.dumps(speeds), encoding="utf-8")


def run(launcher: str, script: str, *, machine_rank: int | None = None) -> dict[str, float]:
    """Run `script` in the processes that `training.launcher` names, and return what rank 0 handed over.

    `machine_rank` is this machine's number where several take part; only that of rank 0 returns anything.
    Raises InputError where the launcher, its configuration or a worker refuses, Interrupted where a signal ended it.
    """
    from accelerate.commands.launch import launch_command

    arguments = _accelerate_arguments(launcher, script, machine_rank)
    _silence_torch()
    with tempfile.TemporaryDirectory(prefix="lathe-launch-") as told, _signals_forwarded() as received:
        arguments.log_dir = told
        arguments.signals_to_handle = "SIGQUIT"  # torch would give workers 30 s to save, however long a step takes
        if arguments.use_cpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            launch_command(arguments)
        except Exception as error:
            if hasattr(error, "failures"):  # torch's ChildFailedError
                _end_as(error.failures, received)
            if isinstance(error, (ValueError, ConnectionError)):  # accelerate's own refusals
                raise _refused(launcher, error) from None
            raise
        for file in Path(told).rglob(SPEEDS):
            speeds: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
            return speeds
    return {}


def check(launcher: str) -> Path:
    """Return the configuration file that `training.launcher` names; look no further than at the string and the file.

    Raises InputError.
    """
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise _refused(launcher, error) from None
    if words[:2] != ["accelerate", "launch"]:
        raise InputError(f"training.launcher is {launcher!r}; no launcher that is known; {REMEDY}")
    joined = " ".join(words).replace("--config_file=", "--config_file ").split()
    if "--config_file" not in joined[:-1]:
        raise InputError(f"training.launcher is {launcher!r}; it names no configuration; {REMEDY}")
    file = Path(joined[joined.index("--config_file") + 1])
    if file.is_absolute() or file.parent != CONFIGS:
        raise InputError(
            f"training.launcher: {file} lies outside {CONFIGS}, whose changes re-run training; put a copy there"
        )
    if not (paths.ROOT / file).is_file():
        known = ", ".join(sorted(each.name for each in (paths.ROOT / CONFIGS).glob("*.yaml")))
        raise InputError(f"training.launcher: {file}: no such file; {CONFIGS} has {known}")
    return file


def _accelerate_arguments(launcher: str, script: str, machine_rank: int | None) -> Any:
    """Return accelerate's own reading of the command and its configuration, refusing what it would run wrongly."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import DistributedType

    file = check(launcher)
    try:
        config = load_config_from_file(str(paths.ROOT / file))
    except Exception as error:  # whatever is wrong with it: YAML, a missing key, one too many, a type
        raise InputError(f"{file}: no configuration of accelerate: {_one_line(error)}; mend it") from None
    kind = getattr(config, "distributed_type", None)
    if kind not in {DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP}:
        raise InputError(
            f"{file}: distributed_type is {getattr(kind, 'value', kind)}; must be MULTI_GPU, MULTI_CPU or FSDP"
        )
    if kind == DistributedType.FSDP and (config.fsdp_config or {}).get("fsdp_version") != 2:
        raise InputError(f"{file}: fsdp_version is not 2; the first version is not supported; set it to 2")
    if config.mixed_precision not in {None, "no"}:
        raise InputError(f"{file}: mixed_precision is {config.mixed_precision!r}; training.precision decides; set 'no'")

    parser = launch_command_parser()

    def refuse(message: str) -> NoReturn:
        raise _refused(launcher, message)

    parser.error = refuse
    words = shlex.split(launcher)[2:]
    if machine_rank is not None:
        words += ["--machine_rank", str(machine_rank)]
    if kind == DistributedType.MULTI_CPU:
        words += ["--multi_gpu"]  # accelerate's name for torch's launcher; it would start CPU processes with MPI
    arguments = parser.parse_args([*words, script])
    arguments.config_file, arguments.use_cpu = str(paths.ROOT / file), config.use_cpu
    if arguments.training_script != script or arguments.training_script_args:
        raise InputError(f"training.launcher is {launcher!r}; it names a program, which is {script}; {REMEDY}")
    processes = config.num_processes if arguments.num_processes is None else arguments.num_processes
    machines = config.num_machines if arguments.num_machines is None else arguments.num_machines
    if processes < 2 or processes % machines:
        raise InputError(
            f"{file}: num_processes is {processes} on {machines} machine(s); must be at least 2 and the same on each"
        )
    if machine_rank is not None and not 0 <= machine_rank < machines:
        raise InputError(f"--machine_rank {machine_rank}: {file} has {machines} machine(s); number them from 0")
    if not config.use_cpu:
        _check_gpus(file, processes // machines)
    return arguments


def _check_gpus(file: Path, needed: int) -> None:
    import torch

    if (there := torch.cuda.device_count()) < needed:
        raise InputError(
            f"{file}: needs {needed} GPUs on this machine, torch sees {there}; lower num_processes, or set "
            "training.launcher to python"
        )


def _refused(launcher: str, problem: object) -> InputError:
    return InputError(f"training.launcher is {launcher!r}; accelerate refuses it: {_one_line(problem)}; {REMEDY}")


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split()).rstrip(".") or type(problem).__name__


@contextmanager
def _signals_forwarded() -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the workers, which save before they end; yield the list of those received.

    Workers have sessions of their own, so that a terminal's Ctrl-C reaches them only from here, as SIGTERM: one that is
    still importing ends without a traceback.
    """
    import psutil

    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        workers = psutil.Process().children()
        if not workers:
            raise Interrupted(INTERRUPTED, number)
        for worker in workers:
            worker.terminate()

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_as(failures: dict[int, Any], received: list[int]) -> NoReturn:
    """End as the worker did that failed first; those that only lost it say nothing."""

    def order(rank: int) -> tuple[int, float]:
        code, told = failures[rank].exitcode, failures[rank].error_file_data
        when = float(told.get("timestamp") or failures[rank].timestamp)
        if code == 2 or code > 128:
            return 0, when  # it said why it stopped
        if code < 0 and -code not in FORWARDED:
            return 1, when  # it could say nothing
        return (3 if code < 0 else 2), when

    rank = min(failures, key=order)
    code, message = failures[rank].exitcode, failures[rank].message
    if code == 2:
        raise InputError(message)
    if code > 128:
        raise Interrupted(message, received[0] if received else code - 128)
    if code > 0:
        print(message, file=sys.stderr)  # noqa: T201 - the worker's traceback
        sys.exit(code)
    if received:
        raise Interrupted(INTERRUPTED, received[0])
    name = signal.Signals(-code).name
    raise Interrupted(
        f"the process of rank {rank} was ended by {name}, by the system for want of memory perhaps; run the same "
        "command again to go on from the last checkpoint",
        -code,
    )


def _silence_torch() -> None:
    # It reports the processes it starts and ends, which the user knows.
    if not logging.getLogger("lathe").isEnabledFor(logging.DEBUG):
        for name in ("torch.distributed.elastic", "torch.distributed.run", "accelerate"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
