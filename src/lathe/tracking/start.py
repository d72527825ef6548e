"""Starts the process that mirrors a run, from the first stage that DVC starts, and waits for nothing."""

import logging
import os
import subprocess
import sys
import time

from lathe import paths
from lathe.params import Tracking
from lathe.tracking import targets

logger = logging.getLogger(__name__)

SCRATCH = paths.SCRATCH / "mirror"
FOLLOWING, LOGS = SCRATCH / "following", SCRATCH / "logs"
KEPT_LOGS = 20


def begun(stage: str, tracking: Tracking) -> None:
    """Start what follows this run of the pipeline, unless an earlier stage has. Called by each stage that DVC runs.

    Raises InputError for a variable of the environment that is of no use.
    """
    chosen, overrides = targets.targets(tracking, os.environ)
    if not chosen:
        return
    import psutil

    dvc = psutil.Process(os.getppid())
    mark = FOLLOWING / f"{dvc.pid}-{dvc.create_time():.2f}"
    mark.mkdir(parents=True, exist_ok=True)
    if stage == "train":
        (mark / "training").touch()  # curves are this run's from now on
    try:
        (mark / "started").touch(exist_ok=False)
    except FileExistsError:
        return
    for line in overrides:
        logger.info("%s", line)
    log = LOGS / f"{time.strftime('%Y%m%d-%H%M%S')}-{dvc.pid}.log"
    log.parent.mkdir(exist_ok=True)
    for old in sorted(LOGS.glob("*.log"))[: -KEPT_LOGS + 1]:
        old.unlink(missing_ok=True)
    logger.info("mirrored to %s; log: %s", " and ".join(map(str, chosen)), log.relative_to(paths.MAIN))
    # Known as a stage of DVC it would end with this one.
    inherited = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    with log.open("wb") as written:
        subprocess.Popen(
            [sys.executable, "-m", "lathe", "mirror", "--follow", str(mark)],
            cwd=paths.MAIN,  # an experiment's own folder goes before this process does
            env={**inherited, "PYTHONPATH": str(paths.ROOT / "src")},
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
