"""A repository with commits and experiments as the pipeline leaves them, answers of 40 rows in DVC's cache."""

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from toy import toy_text

from lathe.common import paths
from lathe.config.artifacts import UNQUANTIZED
from lathe.evaluation import evaluate

ROWS = 40
SAMPLING = evaluate.Resampling(1000, 42)
SCORES = evaluate.define_scores(
    ["exact_match"], normalize="none", answer_pattern=None, bert_score_weight=0.4, judge_weight=None
)


class Repository:
    """A Git and DVC repository in which `run` leaves what a run of the pipeline leaves."""

    def __init__(self, root: Path) -> None:
        from dvc.repo import Repo

        self.root, self.runs = root, 0
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("config", "user.name", "A User")
        self.git("config", "user.email", "user@example.invalid")
        with Repo.init(str(root)):
            pass
        (root / "params.yaml").write_text(toy_text())
        (root / "presets.yaml").write_text(paths.PRESETS.read_text())
        for name in ("train", "evaluate"):
            (root / "stages").mkdir(exist_ok=True)
            (root / f"stages/{name}.py").touch()
        self.base = self.run("main", [False] * ROWS, training_seconds=10.0)

    def git(self, *arguments: str) -> str:
        dates = {"GIT_COMMITTER_DATE": f"{1_800_000_000 + self.runs} +0000"}  # no two runs end in the same second
        done = subprocess.run(
            ["git", *arguments], cwd=self.root, capture_output=True, text=True, check=True, env={**os.environ, **dates}
        )
        return done.stdout.strip()

    def run(
        self,
        name: str,
        right: Sequence[bool],
        changes: Mapping[str, Any] | None = None,
        *,
        rows: Sequence[int] = tuple(range(ROWS)),
        code: str = "0" * 32,
        training_seconds: float | None = None,
        trained: str = "0" * 32,
        better: str = "Q8_0",
        chosen: Sequence[bool] | None = None,
        engine: str | None = None,
    ) -> str:
        """Commit a run that answered `rows`, each rightly or not; as an experiment unless it is `main`.

        Of the quantized files it is `better` that did, and others got no row right. `chosen` says of the documents of a
        task, `choice`, whether `better` got them right. `engine` is what answered, if not llama.cpp in process.
        """
        editor = YAML()
        tree = editor.load(self.root / "params.yaml")
        always: dict[str, Any] = {"quantize.types": ["Q8_0"], "evaluate.metrics": ["exact_match"]}
        if chosen is not None:
            always["benchmark.tasks"] = ["choice"]
        for key, value in {**always, **(changes or {})}.items():
            *sections, last = key.split(".")
            inner = tree
            for section in sections:
                inner = inner[section]
            inner[last] = value
        editor.dump(tree, self.root / "params.yaml")
        asked = [{"messages": [{"role": "user", "content": f"question {row}"}]} for row in rows]
        outs = {"data/processed": {f"{split}.jsonl": asked for split in ("validation", "test")}}
        answers: evaluate.AnswersByArtifact = {}
        scored = {}
        artifacts = [*UNQUANTIZED, *tree["quantize"]["types"]]
        for artifact in artifacts:
            counts = artifact in (*UNQUANTIZED, better)
            answers[artifact] = [answer_row(row, good and counts) for row, good in zip(rows, right, strict=True)]
            outs[f"data/generated/{artifact}"] = {
                f"{split}.jsonl": answers[artifact] for split in ("validation", "test")
            }
            for split in ("validation", "test"):
                scored[f"{artifact}/{split}.jsonl"] = evaluate.score_rows(answers[artifact], SCORES, "exact_match")
        outs["data/scored"] = scored
        report = evaluate.evaluate(answers, {}, dict.fromkeys(artifacts, 1000), SCORES, SAMPLING)
        if engine:
            report = {artifact: {**scores, "engine": engine} for artifact, scores in report.items()}
        for split in ("validation", "test"):
            self.write(f"metrics/evaluate/{split}.json", [report])
        if chosen is not None:
            outs[f"data/benchmark/{better}/choice"] = describe_choices(chosen)
            share = sum(chosen) / len(chosen)
            interval = {"metric": "acc", "low": share - 0.1, "high": share + 0.1}
            measured = {"documents": len(chosen), "acc": share, "bytes": 1000, "lower_is_better": []}
            self.write(
                "metrics/evaluate/benchmark.json",
                [{"choice": {better: {**measured, "intervals": [interval], "deltas": []}}}],
            )
        self.runs += 1  # no two runs take as long
        seconds = 10.0 + self.runs if training_seconds is None else training_seconds
        self.write("metrics/timings/train.json", [{"seconds": seconds, "peak_memory_bytes": 2000}])
        self.write("metrics/timings/evaluate.json", {"seconds": 2.5, "peak_memory_bytes": 1000 + self.runs})
        lock = {
            "train": {
                "cmd": "exec python3 stages/train.py",
                "deps": [{"path": "src/lathe/model.py", "md5": code}],
                "outs": [{"path": "models/adapter", "md5": trained}],
            },
            "evaluate": {
                "cmd": "exec python3 stages/evaluate.py",
                "outs": [{"path": path, "md5": self.cache(files)} for path, files in outs.items()],
            },
        }
        YAML().dump({"schema": "2.0", "stages": lock}, self.root / "dvc.lock")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", name)
        commit = self.git("rev-parse", "HEAD")
        if name != "main":
            self.git("update-ref", f"refs/exps/{self.base[:2]}/{self.base[2:]}/{name}", commit)
            self.git("reset", "--quiet", "--hard", self.base)
        return commit

    def write(self, path: str, content: Any) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(json.dumps(content))

    def cache(self, files: Mapping[str, Sequence[Any]]) -> str:
        """Put a folder of JSON Lines into DVC's cache and return DVC's hash of it."""
        import hashlib

        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree

        tree = Tree()
        for name, rows in files.items():
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
            self.keep(md5, content)
            tree.add(tuple(name.split("/")), None, HashInfo("md5", md5))
        tree.digest()
        self.keep(str(tree.oid), tree.as_bytes())
        return str(tree.oid)

    def keep(self, md5: str, content: bytes) -> None:
        file = self.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def describe_choices(chosen: Sequence[bool]) -> dict[str, list[Any]]:
    """Return the files of a task whose documents are right or wrong, as the stage benchmark leaves them."""
    score = {"value": sum(chosen) / len(chosen), "stderr": None, "lower_is_better": False, "aggregation": "mean"}
    tasks = {"choice": {"documents": len(chosen), "scores": {"acc": score}}}
    rows = [
        {"doc_id": n, "doc_hash": f"h{n}", "doc": {}, "target": 0, "responses": {}, "statistics": {"acc": [each, 1]}}
        for n, each in enumerate(chosen)
    ]
    return {"tasks.json": [{"asked": ["choice"], "tasks": tasks, "groups": {}}], "choice.jsonl": rows}


def answer_row(row: int, right: bool) -> dict[str, Any]:
    return {
        "prompt": f"question {row}",
        "reference": f"answer {row}",
        "completion": f"answer {row}" if right else "?",
        "finish_reason": "stop",
        "tokens": 3,
        "nll": 1.0 if right else 4.0,
        "reference_tokens": 3,
        "kl": None,
    }


def copy_repository(untouched: Repository, root: Path) -> Repository:
    """Copy a repository that tests share, for one that changes it."""
    repository = copy.copy(untouched)
    repository.root = root
    shutil.copytree(untouched.root, root)
    return repository
