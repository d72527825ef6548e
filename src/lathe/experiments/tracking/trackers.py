"""Trackers by name: the class that mirrors a run to MLflow or to Weights & Biases."""

from lathe.experiments.tracking.run_files import MirroredRun
from lathe.experiments.tracking.targets import MlflowTarget, Target
from lathe.experiments.tracking.tracker import Mirror


def create_mirror(target: Target, record: MirroredRun) -> Mirror:
    """Return the mirror of `record` at `target`; nothing is requested yet."""
    if isinstance(target, MlflowTarget):
        from lathe.experiments.tracking.mlflow_tracker import MlflowMirror

        return MlflowMirror(target, record)
    from lathe.experiments.tracking.wandb_tracker import WandbMirror

    return WandbMirror(target, record)
