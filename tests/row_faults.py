"""Faults of rows: tests assert the reason and the field, the whole problems are kept in tests/messages/data.json."""

import re

from refusals import compare_with_kept

from lathe.data.read_files import Fault


def check_fault(fault: Fault, reason: str, field: str | None) -> None:
    """Assert the reason and the field of a fault, and that its problem says what was expected or what to do."""
    assert (fault.reason, fault.field) == (reason, field), fault
    assert re.search(r"; *\S|expected ", fault.problem), f"nothing is expected: {fault.problem}"
    compare_with_kept("data", f"row: {fault.reason}", str(fault))
