import os
import subprocess
import sys

import pytest

from lathe.inference import journal
from lathe.inference.journal import KEPT


def rows(kept, part="test"):
    return {number: kept.row(part, number) for number in kept.done(part)}


def test_rows_are_there_again_when_the_process_was_killed(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from lathe.inference import journal\n"
        "with journal.opened(Path(sys.argv[1]), 'work') as kept:\n"
        "    for number in (3, 1, 2): kept.add('test', number, {'text': 'é' * number})\n"
        "    kept.add('general', 1, {'nll': 0.1})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    with journal.opened(tmp_path, "work") as kept:
        assert rows(kept) == {number: {"text": "é" * number} for number in (1, 2, 3)}
        assert rows(kept, "general") == {1: {"nll": 0.1}}
        assert len(kept) == 4
        kept.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_that_was_cut_short_is_done_again(tmp_path, cut):
    with journal.opened(tmp_path, "work") as kept:
        kept.add("test", 0, {"text": "whole"})
        kept.add("test", 1, {"text": "cut short by a kill"})
    file = tmp_path / "work.jsonl"
    os.truncate(file, file.stat().st_size - cut)
    with journal.opened(tmp_path, "work") as kept:
        assert rows(kept) == {0: {"text": "whole"}}
        kept.add("test", 1, {"text": "again"})
    with journal.opened(tmp_path, "work") as kept:
        assert rows(kept) == {0: {"text": "whole"}, 1: {"text": "again"}}


def test_other_work_begins_with_nothing(tmp_path):
    with journal.opened(tmp_path, "work") as kept:
        kept.add("test", 0, {})
    with journal.opened(tmp_path, "other work") as kept:
        assert len(kept) == 0


def test_the_same_work_at_the_same_time_shares_nothing_and_leaves_the_others_rows_alone(tmp_path):
    with journal.opened(tmp_path, "work") as first:
        first.add("test", 0, {"by": "first"})
        with journal.opened(tmp_path, "work") as second:
            assert len(second) == 0
            second.add("test", 0, {"by": "second"})
            assert rows(second) == {0: {"by": "second"}}
            second.remove()
        assert rows(first) == {0: {"by": "first"}}
    with journal.opened(tmp_path, "work") as again:
        assert rows(again) == {0: {"by": "first"}}


def test_of_work_that_was_not_gone_on_with_the_newest_is_kept(tmp_path):
    for number in range(KEPT + 3):
        with journal.opened(tmp_path, f"work {number:02}") as kept:
            kept.add("test", 0, {})
        os.utime(tmp_path / f"work {number:02}.jsonl", (number, number))
    with journal.opened(tmp_path, "now"):
        left = sorted(file.stem for file in tmp_path.iterdir())
    assert left == ["now", *(f"work {number:02}" for number in range(3, KEPT + 3))]
