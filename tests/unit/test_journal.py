import os
import subprocess
import sys

import pytest

from lathe.inference.journal import MAX_INTERRUPTED, open_journal


def rows(kept, part="test"):
    return {number: kept.read_row(part, number) for number in kept.list_finished(part)}


def test_rows_are_there_again_when_the_process_was_killed(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from lathe.inference.journal import open_journal\n"
        "with open_journal(Path(sys.argv[1]), 'work') as kept:\n"
        "    for number in (3, 1, 2): kept.add('test', number, {'text': 'é' * number})\n"
        "    kept.add('general', 1, {'nll': 0.1})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    with open_journal(tmp_path, "work") as kept:
        assert rows(kept) == {number: {"text": "é" * number} for number in (1, 2, 3)}
        assert rows(kept, "general") == {1: {"nll": 0.1}}
        assert len(kept) == 4
        kept.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_that_was_cut_short_is_done_again(tmp_path, cut):
    with open_journal(tmp_path, "work") as kept:
        kept.add("test", 0, {"text": "whole"})
        kept.add("test", 1, {"text": "cut short by a kill"})
    file = tmp_path / "work.jsonl"
    os.truncate(file, file.stat().st_size - cut)
    with open_journal(tmp_path, "work") as kept:
        assert rows(kept) == {0: {"text": "whole"}}
        kept.add("test", 1, {"text": "again"})
    with open_journal(tmp_path, "work") as kept:
        assert rows(kept) == {0: {"text": "whole"}, 1: {"text": "again"}}


def test_other_work_begins_with_nothing(tmp_path):
    with open_journal(tmp_path, "work") as kept:
        kept.add("test", 0, {})
    with open_journal(tmp_path, "other work") as kept:
        assert len(kept) == 0


def test_the_same_work_at_the_same_time_shares_nothing_and_leaves_the_others_rows_alone(tmp_path):
    with open_journal(tmp_path, "work") as first:
        first.add("test", 0, {"by": "first"})
        with open_journal(tmp_path, "work") as second:
            assert len(second) == 0
            second.add("test", 0, {"by": "second"})
            assert rows(second) == {0: {"by": "second"}}
            second.remove()
        assert rows(first) == {0: {"by": "first"}}
    with open_journal(tmp_path, "work") as again:
        assert rows(again) == {0: {"by": "first"}}


def test_of_work_that_was_not_gone_on_with_the_newest_is_kept(tmp_path):
    for number in range(MAX_INTERRUPTED + 3):
        with open_journal(tmp_path, f"work {number:02}") as kept:
            kept.add("test", 0, {})
        os.utime(tmp_path / f"work {number:02}.jsonl", (number, number))
    with open_journal(tmp_path, "now"):
        left = sorted(file.stem for file in tmp_path.iterdir())
    assert left == ["now", *(f"work {number:02}" for number in range(3, MAX_INTERRUPTED + 3))]


def test_stored_rows_are_written_once_and_read_as_often_as_needed(tmp_path):
    with open_journal(tmp_path, "work") as kept:
        stored = kept.store_rows("test", iter([["é", 1], ["b", 2]]))
        first, second = iter(stored), iter(stored)
        assert next(first) == next(second) == ["é", 1]
        kept.add("test", 0, {})
        assert [*first] == [*second] == [["b", 2]]
    with open_journal(tmp_path, "work") as kept:
        assert [*kept.store_rows("test", must_not_be_read())] == [["é", 1], ["b", 2]]
        assert [*kept.store_rows("validation", iter([["c", 3]]))] == [["c", 3]]
        kept.remove()
    assert not list(tmp_path.iterdir())


def must_not_be_read():
    raise AssertionError
    yield


def test_stored_rows_that_were_cut_short_are_written_again(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from lathe.inference.journal import open_journal\n"
        "def rows():\n"
        "    yield from range(100_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "with open_journal(Path(sys.argv[1]), 'work') as kept: kept.store_rows('test', rows())\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    with open_journal(tmp_path, "work") as kept:
        assert [*kept.store_rows("test", iter([1, 2]))] == [1, 2]
        kept.remove()
    assert not list(tmp_path.iterdir())


def test_rows_of_the_same_work_at_the_same_time_are_stored_apart_and_leave_nothing(tmp_path):
    with open_journal(tmp_path, "work") as first, open_journal(tmp_path, "work") as second:
        assert [*first.store_rows("test", iter([1, 2]))] == [1, 2]
        assert [*second.store_rows("test", iter([3, 4]))] == [3, 4]
        second.remove()
        assert [*first.store_rows("test", iter([]))] == [1, 2]
        first.remove()
    assert not list(tmp_path.iterdir())


def test_stored_rows_go_with_their_journal(tmp_path):
    for number in range(MAX_INTERRUPTED + 1):
        with open_journal(tmp_path, f"work {number}") as kept:
            kept.store_rows("test", iter([1]))
        os.utime(tmp_path / f"work {number}.jsonl", (number, number))
    with open_journal(tmp_path, "now") as kept:
        kept.remove()
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {f"work {n}{end}" for n in range(1, MAX_INTERRUPTED + 1) for end in (".jsonl", ".test.rows")}
