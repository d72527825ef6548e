"""Row report in words: how many rows `preprocess` read, kept and dropped, why, and the first of the faults."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lathe.common import json_files, paths

logger = logging.getLogger("lathe.preprocess")

MAX_FAULTS = 5  # faults that are named with their place
WARNED_FRACTION = 0.01  # of the rows that are dropped, above which there is a warning

# Reasons that say nothing against a row; all others are faults.
OVER_LIMIT = "over_limit"
WITHOUT_FAULT = ("duplicate", "in_other_split", OVER_LIMIT)


def log_rows(report: dict[str, Any], *, file: str) -> None:
    """Log one line about all rows, the first faults, and a warning if many rows were dropped.

    `report` is that of `preprocess`, or the part of it that is known where the stage fails; `file` is where it is.
    Rows over a limit of the preset are dropped because it says so, and are not warned of.
    """
    for read in list_unusual_forms(report):
        logger.info("%s", read)
    if unused := report.get("unused"):
        logger.info("not used: %s", ", ".join(f"{entry['name']} ({entry['rows']} rows)" for entry in unused))
    logger.info("%s", summarize_rows(report))
    for part in report.get("datasets", []):  # of a mixture
        held_out = f"{part['validation']} validation and {part['test']} test rows"
        shown = "%s: %d training rows (%.1f %% of all), %s"
        logger.info(shown, part["dataset"], part["train"], 100 * (part["share_of_train"] or 0), held_out)
    for fault in list_faults(report):
        logger.info("%s", fault)
    rows, reasons = report["rows"]["read"], count_reasons(report)
    dropped = sum(reasons.values()) - reasons[OVER_LIMIT]
    if dropped > WARNED_FRACTION * rows:
        logger.warning(
            "%d of %d rows (%.0f %%) were dropped; %s has more of them", dropped, rows, 100 * dropped / rows, file
        )


def keep_report(report: dict[str, Any]) -> str:
    """Write and log what is known of the rows where the stage fails; return the file's path for a message.

    DVC removes the outputs of a stage before it runs, so that a report among them would be gone.
    """
    file = paths.SCRATCH / "preprocess/report.json"
    json_files.write_json(file, report)
    shown = str(file.relative_to(paths.ROOT)) if file.is_relative_to(paths.ROOT) else str(file)
    log_rows(report, file=shown)
    return shown


def summarize_rows(report: dict[str, Any]) -> str:
    """Return the line `360 rows: 176 kept, 184 dropped (150 template, 34 too long)`, the most frequent reason first."""
    rows = report["rows"]
    cut = f" ({rows['truncated']} of them truncated)" if rows["truncated"] else ""
    reasons = ", ".join(f"{count} {name_reason(reason)}" for reason, count in sort_reasons(count_reasons(report)))
    dropped = f"{rows['dropped']} dropped ({reasons})" if rows["dropped"] else "none dropped"
    unread = f" of {rows['read'] + rows['not_read']}" if rows.get("not_read") else ""
    return f"{rows['read']}{unread} rows: {rows['kept']} kept{cut}, {dropped}"


def list_unusual_forms(report: dict[str, Any]) -> list[str]:
    """Return a line about each file that is not plain UTF-8 with commas: `rows.csv: read as cp1251, delimiter ';'`."""
    lines = []
    for file in report.get("files", []):
        encoding, delimiter = file.get("encoding"), file.get("delimiter")
        shown = [encoding] * bool(encoding) + [f"delimiter {delimiter!r}"] * bool(delimiter)
        if shown:
            lines.append(
                f"{file['file']}: read as {', '.join(shown)}; if that is wrong, name it in the dataset's preset"
            )
    return lines


def count_reasons(report: dict[str, Any]) -> Counter[str]:
    """Return how many rows of all splits were dropped, by reason."""
    reasons: Counter[str] = Counter()
    for split in report["splits"]:
        reasons.update(split["dropped"])
    return reasons


def sort_reasons(reasons: Counter[str]) -> list[tuple[str, int]]:
    """Return reasons and counts, the most frequent first."""
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def name_reason(reason: str) -> str:
    """Return a reason of the report as words."""
    return reason.replace("_", " ")


def list_faults(report: dict[str, Any]) -> list[str]:
    """Return the first faults, each with file, line and reason; of several reasons, one of each comes first."""
    by_reason = {reason: list(_find_cases(report, reason)) for reason, _ in sort_reasons(count_reasons(report))}
    faults = [
        (number, f"{case['at']}: {name_reason(reason)}: {describe_case(case)}")
        for reason, cases in by_reason.items()
        if reason not in WITHOUT_FAULT
        for number, case in enumerate(cases)
    ]
    return [fault for _, fault in sorted(faults, key=lambda item: item[0])[:MAX_FAULTS]]


def describe_case(case: dict[str, Any]) -> str:
    """Return field and problem of a row that was dropped."""
    return f"{case['field']} {case['problem']}" if case["field"] else str(case["problem"])


def _find_cases(report: dict[str, Any], reason: str) -> Iterator[dict[str, Any]]:
    for split in report["examples"]:
        yield from split["dropped"].get(reason, [])
