import pytest

from lathe.common import paths


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with paths.replace_file(target) as partial:
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert sorted(path.name for path in target.parent.iterdir()) == ["file.txt"]


def test_a_failure_leaves_the_old_file_and_no_partial_one(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), paths.replace_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_replaces_the_old_one_only_when_it_is_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "stale").touch()
    with pytest.raises(KeyboardInterrupt), paths.replace_folder(target) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["stale"]
    with paths.replace_folder(target) as partial:
        (partial / "fresh").touch()
    assert [path.name for path in target.iterdir()] == ["fresh"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_run_left_is_cleared_away_by_the_next(tmp_path):
    target = tmp_path / "folder"
    with paths.replace_folder(target) as partial:
        leftover = partial
    leftover.mkdir()
    (leftover / "half").touch()
    with paths.replace_folder(target) as partial:
        (partial / "fresh").touch()
    assert [path.name for path in target.iterdir()] == ["fresh"]


def test_a_linked_output_is_replaced_and_what_it_pointed_to_stays(tmp_path):
    """DVC links outputs to its cache, which must never be written through."""
    cached = tmp_path / "cached"
    cached.write_text("cached")
    target = tmp_path / "file.txt"
    target.symlink_to(cached)
    with paths.replace_file(target) as partial:
        partial.write_text("new")
    assert not target.is_symlink()
    assert cached.read_text() == "cached"
