# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""Answers of the engine vllm: the real script in an environment of its own, with a double of vLLM in it."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import Checkout, copy_of
from generation_checkout import make_generation_checkout
from gguf_models import Made, learnt  # noqa: F401 - fixture

from lathe.common.jsonl import read_jsonl
from lathe.gguf.quantize import quantize

SETTINGS = {
    "generate.max_new_tokens": 8,
    "generate.n_ctx": 256,
    "generate.n_parallel": 8,
    "generate.few_shot": 2,
    "quantize.types": ["Q8_0"],
}
VLLM = {
    "generate.engine": "vllm",
    "generate.vllm_options": {"enforce_eager": True},
    "evaluate.allow_mixed_engines": True,
}
ROWS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory, learnt: Made) -> Checkout:
    """A checkout with weights, files and answers in process, and with an environment that has the double of vLLM."""
    root = tmp_path_factory.mktemp("vllm") / "lathe"
    checkout = make_generation_checkout(
        root, SETTINGS, {"train": 20, "validation": ROWS, "test": ROWS}, "switch on the attic lamp"
    )
    folder = checkout.root / "models/gguf"
    for name in ("base", "merged"):
        shutil.copy(learnt.gguf, folder / f"{name}-f16.gguf")
        shutil.copytree(learnt.folder, checkout.root / "models" / name)
    quantize(learnt.gguf, folder / "Q8_0.gguf", type="Q8_0", threads=2)
    checkout.stage("generate", "base_few_shot", "merged", "Q8_0")
    make_environment(checkout.root / ".vllm")
    return checkout


def make_environment(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "vllm").mkdir()
    shutil.copy(Path(__file__).with_name("vllm_double.py"), packages / "vllm/__init__.py")
    about = packages / "vllm-0.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0.1\n")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")


@pytest.fixture
def checkout(made: Checkout, tmp_path: Path) -> Checkout:
    checkout = copy_of(made, tmp_path / "lathe")
    shutil.rmtree(checkout.root / ".vllm", ignore_errors=True)
    checkout.set(VLLM | {"generate.vllm_python": str(made.root / ".vllm/bin/python")})
    return checkout


def test_it_answers_for_the_weights_and_llama_cpp_for_the_quantized_file(made: Checkout, checkout: Checkout):
    for artifact in ("base_few_shot", "merged", "Q8_0"):
        shutil.rmtree(checkout.root / "data/generated" / artifact)
    checkout.environment["OPENAI_API_KEY"] = "sk-not-for-vllm"
    checkout.stage("generate", "base_few_shot", "merged", "Q8_0")
    same = 0
    for artifact in ("base_few_shot", "merged", "Q8_0"):
        for split in ("validation", "test"):
            rows = read_jsonl(checkout.root / f"data/generated/{artifact}/{split}.jsonl")
            own = read_jsonl(made.root / f"data/generated/{artifact}/{split}.jsonl")
            if artifact == "Q8_0":
                assert rows == own
                continue
            assert [row.pop("engine") for row in rows] == ["vllm"] * ROWS
            for key in ("prompt", "reference", "nll", "reference_tokens"):
                assert [row[key] for row in rows] == [row[key] for row in own]
            same += sum(one == two for one, two in zip(rows, own, strict=True))
    assert same >= 4 * ROWS - 2, "other arithmetic may decide a tie otherwise"
    [engine] = checkout.json("metrics/generate/merged.json")["engine"]
    assert engine == {"name": "vllm", "version": "0.0.1", "options": {"enforce_eager": True}}
    assert "engine" not in checkout.json("metrics/generate/Q8_0.json")
    items = {item["item"]: item for item in checkout.json("metrics/timings/generate.json")["items"]}
    assert "vllm_tokens_per_second" in items["merged"]
    assert "tokens_per_second" in items["Q8_0"]
    assert not list((checkout.root / ".scratch/vllm").glob(".vllm*"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("broken", "CUDA out of memory:  [31mtried to allocate 9 GiB"),
        ("garbage", "gives an answer that cannot be read"),
    ],
)
def test_what_vllm_fails_of_is_said_in_a_line(checkout: Checkout, fault, message):
    shutil.rmtree(checkout.root / "data/generated/merged")
    checkout.environment["VLLM_DOUBLE"] = fault
    done = checkout.stage("generate", "merged", check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (checkout.root / "data/generated/merged").exists()


def test_it_ends_with_the_stage_that_is_killed(checkout: Checkout):
    command = [sys.executable, "stages/generate.py", "merged"]
    running = subprocess.Popen(command, cwd=checkout.root, env=checkout.environment, stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    while not children and running.poll() is None:
        with suppress(psutil.NoSuchProcess):  # that which asks for the version has ended meanwhile
            started = psutil.Process(running.pid).children()
            children = [child for child in started if "vllm_script" in str(child.cmdline())]
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert children
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.parametrize(
    ("remove", "message"),
    [("python", "generate.vllm_python is"), ("vllm", "vLLM is not installed there"), ("weights", "holds no model")],
)
def test_what_is_missing_is_said_before_anything_runs(checkout: Checkout, tmp_path, remove, message):
    if remove == "python":
        checkout.set({"generate.vllm_python": "nowhere/python"})
    elif remove == "vllm":
        checkout.set({"generate.vllm_python": os.path.realpath(sys.executable)})
    else:
        shutil.rmtree(checkout.root / "models/merged")
    done = checkout.stage("generate", "merged", check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr
