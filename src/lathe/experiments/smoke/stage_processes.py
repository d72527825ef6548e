"""Stages of a copy in processes forked from one that has imported the packages, which takes every process 3 to 8 s.

The forked process has the arguments, folder and exit code of the stage's own command, and imports Lathe's modules from
the copy. Where a GPU could be used, stages are started by their own commands: a process cannot use a GPU that the one
it was forked from has looked at, which bitsandbytes does when it is imported.
"""

import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

from lathe.common import operating_system
from lathe.common.dvc_api import StageCommand

STAGE_COMMAND = re.compile(r"exec python3 (stages/\w+\.py)((?: [\w.-]+)*)")
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))  # NVIDIA, AMD, WSL2


class StageProcesses:
    """Runs the commands of stages, one after another."""

    def __init__(self) -> None:
        self.context = None if sys.platform != "linux" or any(device.exists() for device in GPU_DEVICES) else _fork()

    def run(self, stage: StageCommand, command: str) -> int:
        """Run one command of a stage; return its exit code, as a shell gives it."""
        match = STAGE_COMMAND.fullmatch(command)
        if self.context is None or match is None:
            # As DVC does, by a shell; it ends with this process.
            code = operating_system.run_command(["/bin/sh", "-c", command], cwd=stage.folder).returncode
        else:
            arguments = (str(stage.folder), match[1], match[2].split(), dict(os.environ))
            process = self.context.Process(target=_run_stage, args=arguments)
            process.start()
            process.join()
            code = process.exitcode or 0
        return code if code >= 0 else 128 - code


def _fork() -> "multiprocessing.context.ForkServerContext":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as stages/_path.py does, before torch is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lathe.experiments.smoke.packages"])
    return context


def _run_stage(folder: str, script: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Do what `python3 SCRIPT ARGUMENT …` does in a folder."""
    operating_system.end_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lathe"]:
        del sys.modules[name]  # of the checkout; the copy has its own
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(folder, script).parent)
    runpy.run_path(script, run_name="__main__")
