"""Launcher of several processes: accelerate's own, called in this process, and the errors of its workers.

No shell and no PATH are involved: DVC starts the script, the script calls accelerate's launcher, and that starts the
workers: the same script, once per rank. A worker prints nothing when it fails; it writes the message to a file, and the
launcher prints it once, however many workers fail alike.
"""

import importlib.util
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lathe.common import paths
from lathe.common.errors import InputError, Interrupted
from lathe.common.scratch import temporary_folder

CONFIGS = Path("experiments/accelerate")  # in the checkout; the train stage depends on this folder
REMEDY = "write python, or accelerate launch --config_file experiments/accelerate/NAME.yaml"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # set for workers only: the file for the message
THROUGHPUT_FILE = "throughput.json"  # rank 0's, beside that file
INTERRUPTED = "interrupted; run the same command again"
FORWARDED = (signal.SIGINT, signal.SIGTERM)


def is_worker() -> bool:
    """Tell whether a launcher started this process."""
    return ERROR_FILE_VARIABLE in os.environ


def is_needed(launcher: str, machine_rank: int | None) -> bool:
    """Tell whether this process is to start workers. Raises InputError for a machine's rank without a launcher."""
    if launcher == "python" and machine_rank is not None:
        raise InputError(
            f"--machine_rank {machine_rank}: training.launcher is 'python', for one process; {REMEDY}",
            code="machine-rank-without-launcher",
        )
    return launcher != "python" and not is_worker()


def is_main() -> bool:
    """Tell whether this process writes and logs: rank 0, or the only one."""
    return not is_worker() or os.environ["RANK"] == "0"


def is_sharded() -> bool:
    """Tell whether each process holds a part of every weight (FSDP, and stage 3 of DeepSpeed's ZeRO)."""
    return (is_worker() and os.environ.get("ACCELERATE_USE_FSDP") == "true") or get_zero_stage() == 3


def get_zero_stage() -> int:
    """Return the stage of DeepSpeed's ZeRO that this worker trains with; 0 without DeepSpeed."""
    if not is_worker() or os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return 0
    return int(os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"])


def end_worker(message: str, code: int) -> NoReturn:
    """End this worker with that exit code, and let the launcher print the message."""
    content = json.dumps({"message": message, "timestamp": time.time()})
    Path(os.environ[ERROR_FILE_VARIABLE]).write_text(content, encoding="utf-8")
    sys.exit(code)


def report_throughput(throughput: dict[str, float]) -> None:
    """Send what this worker measured to the launcher, which measures the seconds of the whole stage."""
    Path(os.environ[ERROR_FILE_VARIABLE]).with_name(THROUGHPUT_FILE).write_text(
        json.dumps(throughput), encoding="utf-8"
    )


def run(launcher: str, script: str, *, machine_rank: int | None = None) -> dict[str, float]:
    """Run `script` in the processes that `training.launcher` names, and return what rank 0 reported.

    `machine_rank` is this machine's number where several take part; only the machine of rank 0 returns anything.
    Raises InputError for a bad launcher or configuration and where a worker raised it, Interrupted after a signal.
    """
    from accelerate.commands.launch import launch_command

    arguments = _parse_launcher(launcher, script, machine_rank)
    _silence_torch()
    with temporary_folder(paths.SCRATCH, "launch") as folder, _forward_signals() as received:
        arguments.log_dir = str(folder)
        arguments.signals_to_handle = "SIGQUIT"  # else torch gives workers 30 s to save, however long a step takes
        if arguments.use_cpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            launch_command(arguments)
        except Exception as error:
            if hasattr(error, "failures"):  # torch's ChildFailedError
                _end_like_worker(error.failures, received)
            if isinstance(error, (ValueError, ConnectionError)):  # accelerate's own refusals
                raise _make_refusal(launcher, error) from None
            raise
        for file in folder.rglob(THROUGHPUT_FILE):
            throughput: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
            return throughput
    return {}


def check(launcher: str) -> Path:
    """Return the configuration file that `training.launcher` names, without reading it. Raises InputError."""
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise _make_refusal(launcher, error) from None
    if words[:2] != ["accelerate", "launch"]:
        raise InputError(
            f"training.launcher is {launcher!r}; no launcher that is known; {REMEDY}", code="launcher-unknown"
        )
    options = " ".join(words).replace("--config_file=", "--config_file ").split()
    if "--config_file" not in options[:-1]:
        raise InputError(
            f"training.launcher is {launcher!r}; it names no configuration; {REMEDY}", code="launcher-without-config"
        )
    file = Path(options[options.index("--config_file") + 1])
    if file.is_absolute() or file.parent != CONFIGS:
        raise InputError(
            f"training.launcher: {file} is outside {CONFIGS}, whose changes re-run training; put a copy there",
            code="launcher-config-outside",
        )
    if not (paths.ROOT / file).is_file():
        known = ", ".join(sorted(known.name for known in (paths.ROOT / CONFIGS).glob("*.yaml")))
        raise InputError(
            f"training.launcher: {file}: no such file; {CONFIGS} has {known}", code="launcher-config-missing"
        )
    return file


def _parse_launcher(launcher: str, script: str, machine_rank: int | None) -> Any:
    """Parse the command and its configuration as accelerate does; raise InputError for what would train wrongly."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import DistributedType

    file = check(launcher)
    try:
        config = load_config_from_file(str(paths.ROOT / file))
    except Exception as error:  # YAML, a missing or unknown key, a type
        raise InputError(
            f"{file}: no configuration of accelerate: {_to_one_line(error)}; mend it", code="launcher-config-invalid"
        ) from None
    kind = getattr(config, "distributed_type", None)
    if kind not in {
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_CPU,
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
    }:
        raise InputError(
            f"{file}: distributed_type is {getattr(kind, 'value', kind)}; must be MULTI_GPU, MULTI_CPU, FSDP or "
            "DEEPSPEED",
            code="launcher-distributed-type",
        )
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(file, config)
    if kind == DistributedType.FSDP and (config.fsdp_config or {}).get("fsdp_version") != 2:
        raise InputError(
            f"{file}: fsdp_version is not 2; the first version is not supported; set it to 2",
            code="launcher-fsdp-version",
        )
    if config.mixed_precision not in {None, "no"}:
        raise InputError(
            f"{file}: mixed_precision is {config.mixed_precision!r}; training.precision decides; set 'no'",
            code="launcher-mixed-precision",
        )

    parser = launch_command_parser()

    def refuse(message: str) -> NoReturn:
        raise _make_refusal(launcher, message)

    parser.error = refuse
    words = shlex.split(launcher)[2:]
    if machine_rank is not None:
        words += ["--machine_rank", str(machine_rank)]
    if kind == DistributedType.MULTI_CPU:
        words += ["--multi_gpu"]  # selects torch's launcher; for CPU processes accelerate would use MPI
    arguments = parser.parse_args([*words, script])
    arguments.config_file, arguments.use_cpu = str(paths.ROOT / file), config.use_cpu
    if arguments.training_script != script or arguments.training_script_args:
        raise InputError(
            f"training.launcher is {launcher!r}; it names a program, which is {script}; {REMEDY}",
            code="launcher-names-program",
        )
    processes = config.num_processes if arguments.num_processes is None else arguments.num_processes
    machines = config.num_machines if arguments.num_machines is None else arguments.num_machines
    if processes < 2 or processes % machines:
        raise InputError(
            f"{file}: num_processes is {processes} on {machines} machine(s); must be at least 2 and the same on each",
            code="launcher-process-count",
        )
    if machine_rank is not None and not 0 <= machine_rank < machines:
        raise InputError(
            f"--machine_rank {machine_rank}: {file} has {machines} machine(s); number them from 0",
            code="machine-rank-out-of-range",
        )
    if not config.use_cpu:
        _check_gpus(file, processes // machines)
    return arguments


def _check_deepspeed(file: Path, config: Any) -> None:
    settings = config.deepspeed_config or {}
    if "deepspeed_config_file" in settings:
        raise InputError(
            f"{file}: deepspeed_config_file is {settings['deepspeed_config_file']}; DeepSpeed's own file would decide "
            "what the parameters do; write zero_stage here in its place",
            code="launcher-deepspeed-file",
        )
    if (stage := settings.get("zero_stage")) not in {2, 3}:
        raise InputError(
            f"{file}: zero_stage is {stage}; must be 2 or 3; without ZeRO take a DDP configuration",
            code="launcher-zero-stage",
        )
    for key in ("offload_optimizer_device", "offload_param_device"):
        if (device := settings.get(key, "none")) != "none":
            raise InputError(
                f"{file}: {key} is {device}; checkpoints hold no states that lie elsewhere; set none",
                code="launcher-offload",
            )
    if settings.get("zero3_init_flag"):
        raise InputError(
            f"{file}: zero3_init_flag is true; each process reads the weights before they are shared out; set false",
            code="launcher-zero3-init",
        )
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if (value := settings.get(key, "auto")) != "auto":
            raise InputError(f"{file}: {key} is {value}; params.yaml decides; set auto", code="launcher-deepspeed-auto")
    if config.num_machines > 1 and settings.get("deepspeed_multinode_launcher") != "standard":
        raise InputError(
            f"{file}: deepspeed_multinode_launcher is not standard, so that DeepSpeed would log in to the other "
            "machines; set standard",
            code="launcher-deepspeed-machines",
        )
    if config.use_cpu:
        raise InputError(
            f"{file}: use_cpu is true; accelerate runs DeepSpeed on GPUs alone; set false", code="launcher-cpu"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"{file}: distributed_type is DEEPSPEED; the package deepspeed is not installed; install it: "
            "`make setup EXTRAS=deepspeed`",
            code="deepspeed-missing",
        )


def _check_gpus(file: Path, needed: int) -> None:
    import torch

    if (present := torch.cuda.device_count()) < needed:
        raise InputError(
            f"{file}: needs {needed} GPUs on this machine, torch sees {present}; lower num_processes, or set "
            "training.launcher to python",
            code="launcher-gpu-count",
        )


def _make_refusal(launcher: str, problem: object) -> InputError:
    return InputError(
        f"training.launcher is {launcher!r}; accelerate refuses it: {_to_one_line(problem)}; {REMEDY}",
        code="launcher-refused",
    )


def _to_one_line(problem: object) -> str:
    return " ".join(str(problem).split()).rstrip(".") or type(problem).__name__


@contextmanager
def _forward_signals() -> Iterator[list[int]]:
    """Forward SIGINT and SIGTERM to the workers, which save before they end; yield the list of signals received.

    Workers have their own sessions, so that a terminal's Ctrl-C reaches them only from here. It is sent as SIGTERM, by
    which a worker that is still importing ends without a traceback.
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


def _end_like_worker(failures: dict[int, Any], received: list[int]) -> NoReturn:
    """End like the worker that failed first; failures that follow from its loss are not printed."""

    def order(rank: int) -> tuple[int, float]:
        code, written = failures[rank].exitcode, failures[rank].error_file_data
        when = float(written.get("timestamp") or failures[rank].timestamp)
        if code == 2 or code > 128:
            return 0, when  # with a message of its own
        if code < 0 and -code not in FORWARDED:
            return 1, when  # killed, without a message
        return (3 if code < 0 else 2), when

    rank = min(failures, key=order)
    code, message = failures[rank].exitcode, failures[rank].message
    if code == 2:
        raise InputError(message, code="worker-refused")
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
    # It logs every process that it starts and ends.
    if not logging.getLogger("lathe").isEnabledFor(logging.DEBUG):
        for name in ("torch.distributed.elastic", "torch.distributed.run", "accelerate"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
