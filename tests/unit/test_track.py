import json

from lathe.common import metric_files, operating_system, paths


def test_a_stage_of_several_items_has_one_file_with_their_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "METRICS", tmp_path)
    for item, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        metric_files.write_timings("quantize", item, seconds=seconds, throughput={}, items=["a", "b"])
    [content] = json.loads((tmp_path / "timings/quantize.json").read_text())
    assert content["seconds"] == 6.0
    assert [(item["item"], item["seconds"]) for item in content["items"]] == [("a", 4.0), ("b", 2.0)]


def test_an_item_that_is_no_longer_listed_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "METRICS", tmp_path)
    metric_files.write_timings("quantize", "old", seconds=1.0, throughput={}, items=["old"])
    metric_files.write_timings("quantize", "new", seconds=2.0, throughput={}, items=["new"])
    assert json.loads((tmp_path / "timings/quantize.json").read_text())[0]["seconds"] == 2.0


def test_peak_memory_is_at_least_what_was_just_held():
    held = bytearray(50_000_000)
    assert operating_system.get_peak_memory_bytes() > len(held)
