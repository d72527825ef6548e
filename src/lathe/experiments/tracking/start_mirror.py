"""Start of the mirror process, by the first stage that DVC runs; nothing waits for it."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.params import Tracking
from lathe.experiments.tracking import targets

logger = logging.getLogger(__name__)

SCRATCH = paths.SCRATCH / "mirror"
FOLLOWING, LOGS = SCRATCH / "following", SCRATCH / "logs"
KEPT_LOGS = 20


def start_mirroring(stage: str, tracking: Tracking) -> None:
    """Start the mirror process of this run of the pipeline, unless an earlier stage has. Each stage calls it."""
    try:
        chosen, notes = targets.choose_targets(tracking, os.environ)
    except InputError as error:
        chosen, notes = [], [f"mirrored nowhere: {error}"]  # does not stop a pipeline
    if not chosen and not notes:
        return
    import psutil

    dvc = psutil.Process(os.getppid())
    mark = FOLLOWING / f"{dvc.pid}-{dvc.create_time():.2f}"
    mark.mkdir(parents=True, exist_ok=True)
    if stage == "train":
        (mark / "training").touch()  # newer curves are of this run
    try:
        (mark / "started").touch(exist_ok=False)
    except FileExistsError:
        return
    for line in notes:
        logger.info("%s", line)
    if chosen:
        log = LOGS / f"{time.strftime('%Y%m%d-%H%M%S')}-{dvc.pid}.log"
        logger.info("mirrored to %s; log: %s", " and ".join(map(str, chosen)), log.relative_to(paths.MAIN))
        _start_process(mark, log)


def is_running(mark: Path) -> bool:
    """Tell whether the DVC process of a folder of `start_mirroring` is running."""
    import psutil

    pid, _, created = mark.name.partition("-")
    try:
        process = psutil.Process(int(pid))
        return f"{process.create_time():.2f}" == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start_process(mark: Path, log: Path) -> None:
    for old in FOLLOWING.iterdir():
        if not is_running(old):
            shutil.rmtree(old, ignore_errors=True)  # another run may do the same
    log.parent.mkdir(exist_ok=True)
    for old in sorted(LOGS.glob("*.log"))[: -KEPT_LOGS + 1]:
        old.unlink(missing_ok=True)
    # With DVC_STAGE it would end with this process.
    inherited = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    with log.open("wb") as written:
        subprocess.Popen(
            [sys.executable, "-m", "lathe", "mirror", "--follow", str(mark)],
            cwd=paths.MAIN,  # an experiment's own folder is removed before this process ends
            env={**inherited, "PYTHONPATH": str(paths.ROOT / "src"), "LATHE_CHECKOUT": str(paths.ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
