"""Score every artifact's answers on the held-out rows, and what each step cost against base and merged.

reads   data/generated/, metrics/generate/, params.yaml: evaluate, quantize.types
writes  metrics/evaluate/{validation,test}.json, metrics/evaluate/scores.csv (for the plots)
removes what is left of quantization types that are no longer listed
"""

import csv
import shutil

import _path  # noqa: F401

from lathe import paths, stage, track
from lathe.params import Config


def main(config: Config) -> None:
    from lathe.evaluate import evaluate, plot_rows

    artifacts = ["base", "merged", *config.params.quantize.types]
    _forget_other_artifacts([*artifacts, "base_few_shot"])
    reports = {
        split: evaluate(
            paths.DATA_GENERATED, paths.METRICS / "generate", artifacts, split, config.params.evaluate.metrics
        )
        for split in ("validation", "test")
    }
    for split, report in reports.items():
        track.write_json(paths.METRICS / f"evaluate/{split}.json", report)
    rows = plot_rows(reports)
    with (
        paths.whole_file(paths.METRICS / "evaluate/scores.csv") as partial,
        partial.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _forget_other_artifacts(artifacts: list[str]) -> None:
    # DVC leaves the files of a type that was taken off the list, and this stage depends on the folders they lie in.
    for folder in (paths.DATA_GENERATED, paths.METRICS / "generate", paths.METRICS / "quantize", paths.GGUF):
        for path in folder.iterdir():
            if path.name.removesuffix("-f16.gguf").removesuffix(".gguf").removesuffix(".json") not in artifacts:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    stage.run(main)
