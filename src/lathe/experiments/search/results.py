"""Results of a search: a file and plots in metrics/search, and the best experiment applied to the workspace.

metrics/search is not in Git, like the report: a study belongs to its storage, not to a commit, and its trials must not
have the results of others among their files.
"""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import find_head, run_git
from lathe.common.json_files import write_json
from lathe.experiments.search import trial
from lathe.experiments.search.study import ENVIRONMENT, EXPERIMENT, PRUNED, REASON, SETTING, Study
from lathe.provenance.revisions import list_experiments

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

FOLDER = paths.METRICS / "search"
FEWEST_FOR_IMPORTANCE = 4  # trials with scores
MOST_NAMES = 10  # next to the points of a front: more would overlap


def write_results(study: Study, folder: Path) -> None:
    """Write `study.json`, the course of the best score and the plots into the study's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "study.json", summarize(study))
    if rows := track_best(study):
        with paths.replace_file(folder / "course.tsv") as partial:
            lines = ["trial\tbest", *(f"{row['trial']}\t{row['best']}" for row in rows)]
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_plots(study, folder)


def summarize(study: Study) -> dict[str, Any]:
    """Return the content of study.json: what was searched, every trial, and which are the best."""
    plan, trials = study.plan, study.trials()
    setting = study.optuna_study.user_attrs[SETTING]
    return {
        "study": plan.study,
        "sampler": plan.sampler,
        "objectives": [objective.model_dump() for objective in plan.objectives],
        "overrides": setting["overrides"],
        "environment": study.optuna_study.user_attrs.get(ENVIRONMENT, {}),
        "best": [name_experiment(study, one) for one in find_best(study)],
        "importance": measure_importances(study),
        "trials": [
            {
                "experiment": name_experiment(study, one),
                "number": one.number,
                "state": one.state.name.lower(),
                "parameters": one.params,
                "scores": dict(zip((o.metric for o in plan.objectives), one.values, strict=True)) if one.values else {},
                "commit": one.user_attrs.get(EXPERIMENT),
                "reason": one.user_attrs.get(REASON),
                "pruned": one.user_attrs.get(PRUNED),
                "seconds": one.duration.total_seconds() if one.duration else None,
            }
            for one in trials
        ],
    }


def find_best(study: Study) -> list["optuna.trial.FrozenTrial"]:
    """Return the best trials: one, or with several objectives the Pareto front."""
    if not any(one.values for one in study.trials()):
        return []
    if len(study.plan.objectives) == 1:
        return [study.optuna_study.best_trial]
    return sorted(study.optuna_study.best_trials, key=lambda one: one.number)


def track_best(study: Study) -> list[dict[str, float]]:
    """Return the best score so far after each trial; empty for several objectives."""
    if len(study.plan.objectives) > 1:
        return []
    better = max if study.plan.objectives[0].direction == "maximize" else min
    rows: list[dict[str, float]] = []
    for one in study.trials():
        if one.values:
            score = one.values[0]
            so_far = better(score, rows[-1]["best"]) if rows else score
            rows.append({"trial": one.number, "best": so_far})
    return rows


def measure_importances(study: Study) -> dict[str, float]:
    """Return the importance of each parameter for the first objective (PED-ANOVA); empty after few or equal trials."""
    from optuna.importance import get_param_importances

    scores = [one.values[0] for one in study.trials() if one.values]
    if len(scores) < FEWEST_FOR_IMPORTANCE or min(scores) == max(scores):
        return {}
    return get_param_importances(study.optuna_study, target=_choose_target(study))


def _choose_target(study: Study) -> "Callable[[optuna.trial.FrozenTrial], float] | None":
    # With one objective Optuna knows the direction itself.
    if len(study.plan.objectives) == 1:
        return None
    sign = -1 if study.plan.objectives[0].direction == "maximize" else 1
    return lambda one: sign * one.values[0]


def draw_plots(study: Study, folder: Path) -> None:
    """Draw the scores over the trials, the importances, and with two objectives the Pareto front."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    from optuna.visualization import matplotlib as plots

    if not find_best(study):
        return
    names = list(study.plan.directions)
    first = (lambda one: one.values[0]) if len(names) > 1 else None
    pictures = {"history": plots.plot_optimization_history(study.optuna_study, target=first, target_name=names[0])}
    pictures["history"].xaxis.set_major_locator(MaxNLocator(integer=True))
    if measure_importances(study):
        pictures["importance"] = plots.plot_param_importances(
            study.optuna_study, target=_choose_target(study), target_name=names[0]
        )
    if len(names) == 2:
        pictures["pareto"] = axes = plots.plot_pareto_front(study.optuna_study, target_names=names)
        for one in find_best(study)[:MOST_NAMES]:
            axes.annotate(
                name_experiment(study, one), one.values, xytext=(0, 8), textcoords="offset points", ha="center"
            )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    for title, axes in pictures.items():
        axes.set_title(f"{study.plan.study}: {axes.get_title()}")
        if (legend := axes.get_legend()) is not None:
            legend.set_bbox_to_anchor(None)
            legend.set_loc("best")
        axes.figure.tight_layout()
        axes.figure.savefig(folder / f"{title}.png", dpi=120, bbox_inches="tight")
    pyplot.close("all")


def apply_best(study: Study, wanted: str | None) -> str:
    """Put the best experiment, or of several best ones the `wanted` one, into the workspace; return its name.

    Raises InputError if there is none, if there are several and none is named, and if changes would be lost.
    """
    finished = {name_experiment(study, one): one for one in study.trials() if one.values}
    if not finished:
        raise InputError(
            f"study {study.plan.study} has no finished trial; run the search without --apply first",
            code="no-finished-trial",
        )
    study.check_setting({"objectives": study.plan.directions})  # another code or data does not matter here
    if wanted is None:
        front = find_best(study)
        if len(front) > 1:
            listed = "; ".join(
                f"{name_experiment(study, one)}: {', '.join(f'{value:g}' for value in one.values)}" for one in front
            )
            raise InputError(
                f"--apply: {len(front)} experiments are best, each in its way ({listed}); name one of them",
                code="several-best",
            )
        wanted = name_experiment(study, front[0])
    if wanted not in finished:
        raise InputError(
            f"--apply {wanted}: no finished experiment of the study; it has {', '.join(finished)}",
            code="no-such-experiment",
        )
    commit = finished[wanted].user_attrs[EXPERIMENT]
    baselines = {experiment.commit: experiment.baseline for experiment in list_experiments()}
    if commit not in baselines:
        raise InputError(
            f"--apply {wanted}: not in this repository; where another machine made it, get it with "
            f"`dvc exp pull REMOTE {wanted}`",
            code="experiment-elsewhere",
        )
    if changed := run_git("diff", "--name-only", "HEAD").decode().splitlines():
        raise InputError(
            f"--apply {wanted}: DVC would put the whole of it over what is not committed, which is "
            f"{', '.join(changed)}; commit it, or `git stash`",
            code="uncommitted-changes",
        )
    if baselines[commit] != find_head():
        logger.warning("%s began from the commit %.10s: it goes back behind what came later", wanted, baselines[commit])
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "apply", commit]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "it failed").splitlines()[-1].removeprefix("ERROR: ")
        raise InputError(f"--apply {wanted}: `dvc exp apply` says: {reason}", code="apply-failed")
    return wanted


def name_experiment(study: Study, one: "optuna.trial.FrozenTrial") -> str:
    """Return the name of a trial's experiment."""
    return trial.name_experiment(study.plan.study, one.number)
