"""Many rows: bounded memory, and nothing left behind by a killed run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

# Prepares raw into out as the stage does; arguments: raw, out, processes. Prints its peak memory in bytes: not
# ru_maxrss, which begins with that of the process that started it.
PROGRAM = """
import sys
from pathlib import Path
from byte_chat import LENIENT, byte_chat
from lathe.common import paths
from lathe.data.prepare import prepare
from lathe.config.presets import LocalDataset

raw, out, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
preset = LocalDataset(source="local", path="raw")
with paths.replace_folder(out) as folder:
    prepare(
        raw, preset, folder, tokenizer=byte_chat(), seed=1, max_length=4000, settings=LENIENT, processes=processes
    )
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


def start(raw: Path, out: Path, *, processes: int) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(raw), str(out), str(processes)]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)


def write_rows(raw: Path, count: int, *, characters: int) -> None:
    raw.mkdir()
    filler = "word " * (characters // 5)
    for split, numbers in {"train": range(count), "validation": range(-9, -6), "test": range(-6, -3)}.items():
        with (raw / f"{split}.jsonl").open("w") as lines:
            for number in numbers:
                lines.write(json.dumps({"prompt": f"{number} {filler}", "completion": f"{number}"}) + "\n")


def peak_bytes(folder: Path, count: int, *, characters: int) -> int:
    folder.mkdir()
    write_rows(folder / "raw", count, characters=characters)
    process = start(folder / "raw", folder / "out", processes=1)
    output, _ = process.communicate()
    assert process.returncode == 0
    return int(output)


@LINUX
def test_memory_does_not_grow_with_the_text_of_the_rows(tmp_path):
    few, many = (peak_bytes(tmp_path / str(count), count, characters=1000) for count in (2_000, 20_000))
    # 18,000 more rows are 18 MB of text, and as much again as objects; some 200 bytes of each are numbers to keep.
    assert many - few < 12_000_000


@LINUX
@pytest.mark.slow
def test_a_million_rows_are_prepared_in_less_than_1_5_gb(tmp_path):
    assert peak_bytes(tmp_path / "million", 1_000_000, characters=60) < 1_500_000_000


@LINUX
def test_a_killed_run_leaves_no_process_and_the_next_run_clears_what_it_wrote(tmp_path):
    write_rows(tmp_path / "raw", 30_000, characters=100)
    process = start(tmp_path / "raw", tmp_path / "out", processes=2)
    partial = tmp_path / ".out.partial"
    wait_for(lambda: (partial / "train.jsonl.0").exists())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    wait_for(lambda: not any(map(is_running, children)))

    assert start(tmp_path / "raw", tmp_path / "out", processes=2).wait() == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "raw"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]


def is_running(pid: str) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty for one that has ended
    except FileNotFoundError:
        return False


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
