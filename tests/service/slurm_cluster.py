"""A Slurm cluster of one node on this machine: munged, slurmctld and slurmd, from Debian's slurm-wlm and munge."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
MinJobAge=600
BatchStartTimeout=60
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """A cluster that runs; the commands of Slurm find it by `environment`."""

    def __init__(self, folder: Path, cpus: int) -> None:
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        ports = [_find_port(), _find_port()]
        host = socket.gethostname()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, ports=ports, cpus=cpus))
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: list[subprocess.Popen[bytes]] = []
        munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--seed-file={folder}/seed", *munge)
        _wait(lambda: (folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D", "-N", host)
        _wait(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T", check=False))

    def call(self, program: str, *words: str, check: bool = True) -> str:
        """Run a command of Slurm and return what it prints."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run([program, *words], env=environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def stop(self) -> None:
        """Cancel all jobs and end the cluster."""
        self.call("scancel", "--full", "--user=root", check=False)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(timeout=60)

    def _start(self, program: str, *words: str) -> None:
        command = [str(shutil.which(program, path=PATH)), *words]
        log = (self.folder / f"{program}.log").open("wb")
        environment = {**os.environ, **self.environment}
        self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
