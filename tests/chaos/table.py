"""Table of the faults, by kind and subject, in a page of the documentation."""

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin: make chaos -->", "<!-- end: make chaos -->"


def write_table(page: Path, records: Sequence[dict[str, Any]], planned: int, seed: int) -> None:
    """Put the table between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    lines = "\n".join(format_table(records, planned, seed))
    page.write_text(f"{head}{BEGIN}\n{lines}\n{END}{tail}", encoding="utf-8")


def format_table(records: Sequence[dict[str, Any]], planned: int, seed: int) -> Iterator[str]:
    """Yield the lines: kinds with their subjects, how many were injected and survived."""
    outcomes = Counter(record["outcome"] for record in records)
    minutes = sum(record["seconds"] for record in records) / 60
    yield (
        f"{sum(outcomes.values())} of {planned} faults, seed {seed}: {outcomes['survived']} survived, "
        f"{outcomes['failed']} failed, {outcomes['not run']} not run; {minutes:.0f} minutes on {platform.system()}."
    )
    yield ""
    yield "| kind | in | injected | survived |"
    yield "| --- | --- | --- | --- |"
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
    for kind in sorted(kinds):
        found = kinds[kind]
        subjects = Counter(record["subject"] for record in found)
        shown = ", ".join(f"{name} × {count}" if count > 1 else name for name, count in sorted(subjects.items()))
        ran = [record for record in found if record["outcome"] != "not run"]
        survived = sum(record["outcome"] == "survived" for record in found)
        yield f"| {kind} | {shown} | {len(ran)} | {survived} |"
