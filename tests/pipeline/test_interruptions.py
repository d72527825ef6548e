"""Pulling the plug: whatever is killed, and whenever, a plain rerun ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Checkout, add_small_inputs, copy_of, make_checkout, output_hashes

from lathe.common.metric_files import list_timing_stems

ITEMS = [
    *("local_files@model", "local_files@dataset", "local_files_encoder"),
    *("fetch@model", "fetch@dataset", "fetch_encoder", "preprocess", "train", "merge"),
    *("convert_base", "convert_merged", "check_converted_base", "check_converted_merged"),
    *("quantize@Q8_0", "quantize@Q4_K_M", "generate@base", "generate@merged", "generate_few_shot"),
    *("generate_quantized@Q8_0", "generate_quantized@Q4_K_M", "judge", "evaluate", "card"),
]
# Those with longer names before those whose names these begin with.
SCRIPTS = sorted(list_timing_stems(), key=len, reverse=True)
VICTIMS = ("all of it", "dvc", "the stage")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Checkout]:
    """A checkout in which nothing has run; each test runs one item to its end, in the order of the pipeline."""
    checkout = make_checkout(tmp_path_factory.mktemp("interrupted") / "lathe").without_preloading()
    add_small_inputs(checkout, small_model)
    checkout.environment["TMPDIR"] = str(tmp_path_factory.mktemp("temporary"))
    yield checkout
    assert not list(Path(checkout.environment["TMPDIR"]).iterdir())


def find_script(item: str) -> str:
    """Return the name of the script that runs an item; an item without an @ names what it is for behind it."""
    name = item.partition("@")[0]
    return next(script for script in SCRIPTS if name == script or name.startswith(f"{script}_"))


def processes_in(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        cwd, status = process.info["cwd"], process.info["status"]
        if cwd and Path(cwd).is_relative_to(root) and status != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def assert_nothing_runs_in(root: Path) -> None:
    deadline = time.monotonic() + 10
    while processes_in(root) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(root) == []


def kill(process: "subprocess.Popen[bytes]", victim: str) -> None:
    stages = [child for child in psutil.Process(process.pid).children() if "stages/" in " ".join(child.cmdline())]
    if victim == "all of it":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "the stage" and stages:
        stages[0].kill()
    else:
        process.kill()


def run_again(checkout: Checkout, *arguments: str) -> None:
    """What `make repro` does once there is an environment."""
    checkout.check()
    checkout.run("dvc", "repro", *arguments)


def test_a_lock_cut_short_is_put_back_and_what_ran_since_comes_from_the_cache(
    reproduced: Checkout, tmp_path: Path
) -> None:
    checkout = copy_of(reproduced, tmp_path / "lathe")
    checkout.set({"quantize.types": ["Q8_0", "Q4_K_M", "Q4_0"]})
    checkout.run("dvc", "repro", "quantize@Q4_0")
    whole = output_hashes(checkout)
    lock = checkout.root / "dvc.lock"
    text = lock.read_text()
    # The last two are locks by their form: at the end of a stage, and of what it depends on.
    at_a_stage = text.index("\n  preprocess:\n") + 1
    cuts = (0, 9, text.index("fetch@model") + 20, text.index("params:") + 9, at_a_stage)
    for cut in (*cuts, text.index("    outs:\n", at_a_stage)):
        lock.write_text(text[:cut])
        run_again(checkout, "quantize@Q4_0")
        assert output_hashes(checkout) == whole


def test_conflicts_of_a_merge_in_the_lock_are_put_back_and_said(reproduced: Checkout, tmp_path: Path) -> None:
    checkout = copy_of(reproduced, tmp_path / "lathe")
    lock = checkout.root / "dvc.lock"
    text = lock.read_text()
    lines = text.splitlines(keepends=True)
    where = next(number for number, line in enumerate(lines) if line.strip().startswith("md5:"))
    other = lines[where].replace("md5: ", "md5: 0")
    lines[where : where + 1] = ["<<<<<<< HEAD\n", lines[where], "=======\n", other, ">>>>>>> other\n"]
    lock.write_text("".join(lines))
    timings = checkout.root / "metrics/timings/quantize.json"
    timings.write_text(f"<<<<<<< HEAD\n{timings.read_text()}\n>>>>>>> other\n")
    done = checkout.run("python3", "-m", "lathe", "check", env={"PYTHONPATH": str(checkout.root / "src")})
    assert "dvc.lock had conflicts of a merge: that of HEAD is back; " in done.stderr
    assert lock.read_text() == text
    run_again(checkout)
    assert output_hashes(checkout) == output_hashes(reproduced)


@pytest.mark.parametrize("how", ["cut short", "emptied", "its listing cut short"])
def test_a_damaged_copy_in_the_cache_is_not_taken_for_an_output(reproduced: Checkout, tmp_path: Path, how: str) -> None:
    """DVC takes what is read-only for whole. The output is gone, and would be linked to it."""
    checkout = copy_of(reproduced, tmp_path / "lathe")
    md5 = next(md5 for md5 in output_hashes(checkout)["merge"] if md5.endswith(".dir"))
    cached = checkout.root / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}"
    if not how.startswith("its listing"):
        weights = next(each["md5"] for each in json.loads(cached.read_text()) if "safetensors" in each["relpath"])
        cached = checkout.root / f".dvc/cache/files/md5/{weights[:2]}/{weights[2:]}"
    content = b"" if how == "emptied" else cached.read_bytes()[:-100]
    cached.unlink()
    cached.write_bytes(content)
    cached.chmod(0o444)
    shutil.rmtree(checkout.root / "models/merged")
    done = checkout.run("python3", "-m", "lathe", "check", env={"PYTHONPATH": str(checkout.root / "src")})
    assert "models/merged: DVC's copy was damaged, of another size than dvc.lock has, and is removed" in done.stderr
    assert not cached.exists()
    assert "Running stage 'merge'" in checkout.run("dvc", "repro").stdout
    assert output_hashes(checkout) == output_hashes(reproduced)
    assert (checkout.root / "dvc.lock").read_text() == (reproduced.root / "dvc.lock").read_text()


def test_a_list_of_running_commands_cut_short_is_removed(reproduced: Checkout, tmp_path: Path) -> None:
    checkout = copy_of(reproduced, tmp_path / "lathe")
    listing = checkout.root / ".dvc/tmp/rwlock"
    for cut in ("", '{"a": {"wri'):
        listing.write_text(cut)
        assert checkout.run("dvc", "repro", check=False).returncode != 0
        run_again(checkout)
    listing.write_text("{}")
    run_again(checkout)
    assert listing.exists()


@pytest.mark.slow
@pytest.mark.parametrize("item", ITEMS)
def test_an_item_killed_at_any_moment_ends_the_same_when_run_again(
    reproduced: Checkout, interrupted: Checkout, item: str
) -> None:
    root, script = interrupted.root, find_script(item)
    timings = reproduced.json(f"metrics/timings/{script}.json")
    longest = max([entry["seconds"] for entry in timings.get("items", [])] or [timings["seconds"]])
    for victim in VICTIMS:
        moment = random.uniform(0.5, 3.0 + longest)  # dvc and the imports take some three seconds more
        print(f"{item}: {victim} is killed after {moment:.2f} s")
        command = ["dvc", "repro", "--single-item", "--force", item]
        with subprocess.Popen(command, cwd=root, env=interrupted.environment, start_new_session=True) as process:
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                kill(process, victim)
        assert_nothing_runs_in(root)

    # `--force`: a run that was finished before another was killed would come from DVC's run cache.
    run_again(interrupted, "--single-item", "--force", item)
    assert output_hashes(interrupted)[item] == output_hashes(reproduced)[item]
    left = [path for top in ("data", "models", "metrics") for path in (root / top).rglob("*.partial")]
    assert left == []


@pytest.mark.parametrize("victim", ["dvc", pytest.param("the stage", marks=pytest.mark.slow)])
def test_a_killed_conversion_leaves_no_process_and_ends_the_same_when_run_again(
    reproduced: Checkout, tmp_path: Path, victim: str
) -> None:
    """The one stage with a process of its own beneath it."""
    checkout = copy_of(reproduced, tmp_path / "lathe").without_preloading()
    command = ["dvc", "repro", "--single-item", "--force", "convert_merged"]
    with subprocess.Popen(command, cwd=checkout.root, env=checkout.environment, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not any("run_converter" in " ".join(p.cmdline()) for p in psutil.Process(process.pid).children(True)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        kill(process, victim)
    assert_nothing_runs_in(checkout.root)
    run_again(checkout, "--single-item", "--force", "convert_merged")  # not from DVC's run cache
    assert output_hashes(checkout) == output_hashes(reproduced)
    assert not list((checkout.root / "models").rglob("*.partial"))
