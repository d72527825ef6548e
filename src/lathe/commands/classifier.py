"""What the commands of the classifier's pipeline do; each imports what it needs."""

import argparse
import sys


def classify(args: argparse.Namespace) -> None:
    """Print the labels of texts, or of those of a file."""
    from lathe.classify.predict import classify_texts

    classify_texts(args.texts, args.file, args.out)


def print_summary(name: str, *, of_classifier: bool) -> None:
    """Print the summary of a revision's run: of the classifier's pipeline, or of the main one."""
    from lathe.provenance.revisions import ClassifierRevision, find_revision
    from lathe.reports import run_summary
    from lathe.reports.classifier_summary import summarize_classifier

    if not of_classifier:
        run_summary.print_summary(name)
        return

    found = find_revision(name)
    lines = list(summarize_classifier(ClassifierRevision(found.name, found.commit)))
    sys.stdout.write("".join(f"{line}\n" for line in ["", *lines]) if lines else "")
    sys.stdout.flush()
