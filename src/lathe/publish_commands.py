"""Commands of `lathe` for what leaves the repository: verify, and the judge held against people."""

import argparse
import sys

from lathe.common import paths
from lathe.common.text import write_lines
from lathe.config.load import load


def verify_outputs(args: argparse.Namespace) -> None:
    """Compare every output with dvc.lock, and exit with the result."""
    from lathe.provenance import verify

    sys.exit(verify.run())


def compare_judge_with_people(args: argparse.Namespace) -> None:
    """Print how far the kept verdicts agree with a file of marks that people gave."""
    from lathe.evaluation.judge_agreement import compare_with_marks

    write_lines(compare_with_marks(args.file, paths.DATA_JUDGED, seed=load().params.seed).describe())
