"""Whatever is wrong with what a user gives: one clear line, exit code 2, no traceback, nothing half-written."""

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Checkout, copy_of

FILLER = "filler"


class Case(NamedTuple):
    harm: Callable[[Checkout], None]
    stages: str  # run one after the other; the last of them refuses
    message: str
    reads_nothing: bool = False  # then the answer takes less than a second


def edit(name: str, old: str, new: str) -> Callable[[Checkout], None]:
    def harm(checkout: Checkout) -> None:
        text = (checkout.root / name).read_text()
        assert old in text
        (checkout.root / name).write_text(text.replace(old, new, 1))

    return harm


def params(old: str, new: str) -> Callable[[Checkout], None]:
    return edit("params.yaml", old, new)


def rows(change: Callable[[bytes], bytes]) -> Callable[[Checkout], None]:
    """Change the user's dataset, which has sixty rows."""

    def harm(checkout: Checkout) -> None:
        replace(checkout.root / "data/local/few.jsonl", change)

    return harm


def model(change: Callable[[Path], None]) -> Callable[[Checkout], None]:
    return lambda checkout: change(checkout.root / "models/local/small")


def replace(file: Path, change: Callable[[bytes], bytes]) -> None:
    content = change(file.read_bytes())
    file.unlink()  # linked into DVC's cache
    file.write_bytes(content)


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


LAST_ROW = b'{"ask": "turn it on"}\n'

CASES = {
    "unknown key": Case(params("seed: 42", "seed: 42\nsed: 1"), "train", "sed is not a known key; did you mean", True),
    "unknown nested key": Case(
        params("  lora_alpha:", "  lora_alfa: 1\n  lora_alpha:"),
        "merge",
        "params.yaml: lora.lora_alfa is not a known key; did you mean 'lora_alpha'?",
        True,
    ),
    "wrong type": Case(params("seed: 42", "seed: '42'"), "fetch", "seed is '42'; must be integer", True),
    "out of range": Case(
        params("learning_rate: 0.01", "learning_rate: 2"),
        "train",
        "params.yaml: training.learning_rate is 2; must be less than or equal to 1",
        True,
    ),
    "null": Case(params("  r: 16", "  r: null"), "evaluate", "lora.r is null; must be integer", True),
    "not yaml": Case(params("  r: 16", "  r: [16"), "train", "params.yaml:", True),
    "unknown model": Case(params("model: small", "model: smal"), "fetch", "did you mean 'small'?", True),
    "unknown dataset": Case(params("dataset: few", "dataset: fwe"), "preprocess", "did you mean 'few'?", True),
    "unknown quant type": Case(params("- Q8_0", "- Q8_9"), "fetch", "'Q8_9' is no quantization type; did you", True),
    "unknown item": Case(lambda checkout: None, "quantize:Q2_K", "no such item; known: Q8_0, Q4_K_M", True),
    "max_length of another model": Case(
        params("max_length: 256", "max_length: 100000"), "preprocess", "the model reads at most 2048; lower it", True
    ),
    "max_length asked of train": Case(
        params("max_length: 256", "max_length: 100000"), "train", "the model reads at most 2048; lower it", True
    ),
    "targets that match nothing": Case(
        params("target_modules: all-linear", "target_modules: [query]"),
        "train",
        "lora.target_modules: 'query' matches no layer; this model's layers:",
    ),
    "empty dataset": Case(rows(lambda _: b""), "fetch:dataset preprocess", "few.jsonl: holds no row; give a file"),
    "a row without an answer": Case(
        rows(lambda old: old + LAST_ROW), "fetch:dataset preprocess", "few.jsonl:61: missing_column: reply is missing;"
    ),
    "a line cut short": Case(
        rows(lambda old: old[:-9]), "fetch:dataset preprocess", "few.jsonl:60: malformed_json: is not a JSON object:"
    ),
    "not UTF-8": Case(
        rows(lambda old: old + b'{"ask": "\xff"}\n'), "fetch:dataset preprocess", "few.jsonl:61: byte 0xff is not UTF-8"
    ),
    "no dataset": Case(
        lambda checkout: (checkout.root / "data/local/few.jsonl").unlink(), "fetch:dataset", "no such file or", True
    ),
    "no weights": Case(
        model(lambda folder: (folder / "model.safetensors").unlink()), "fetch:model", "holds no *.safetensors", True
    ),
    "truncated weights": Case(
        model(lambda folder: replace(folder / "model.safetensors", lambda old: old[:-1])),
        "fetch:model",
        "model.safetensors: not a whole safetensors file",
        True,
    ),
    "pickled weights": Case(model(pickle_instead), "fetch:model", "pickled weights are never loaded", True),
    "no tokenizer": Case(
        model(lambda folder: (folder / "tokenizer_config.json").unlink()),
        "fetch:model",
        "holds no tokenizer_config.json",
        True,
    ),
    "a converter that is not there": Case(
        params("llama_cpp_dir:", "llama_cpp_dir: elsewhere"), "convert:base", "no convert_hf_to_gguf.py"
    ),
    "a quantizer that is not there": Case(
        params("binary:", "binary: elsewhere"), "quantize:Q8_0", "elsewhere cannot be run (No such file", True
    ),
    "damaged rows between the stages": Case(
        lambda checkout: replace(checkout.root / "data/processed/train.jsonl", lambda old: old[:-9]),
        "train",
        "train.jsonl:",
    ),
}


@pytest.fixture(scope="module")
def checkout(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return copy_of(reproduced, tmp_path_factory.mktemp("refusals") / "lathe")


def contents(checkout: Checkout) -> dict[str, bytes]:
    """Every file that a stage could have written, timings and speeds aside."""
    found = {}
    for top in ("data", "models", "metrics"):
        for path in sorted((checkout.root / top).rglob("*")):
            name = str(path.relative_to(checkout.root))
            if path.is_file() and not name.startswith(("metrics/timings", "metrics/speed")):
                found[name] = path.read_bytes()
    return found


def run(checkout: Checkout, stage: str) -> subprocess.CompletedProcess[str]:
    name, *items = stage.split(":")
    return checkout.stage(name, *items, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1, done.stderr
    assert done.stderr.rstrip().endswith(errors[0])
    assert message in errors[0]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(checkout: Checkout, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    touched = ("params.yaml", "presets.yaml", "data", "models")
    for top in touched:
        source = checkout.root / top
        shutil.copytree(source, tmp_path / top) if source.is_dir() else shutil.copy(source, tmp_path / top)
    try:
        case.harm(checkout)
        *before, last = case.stages.split()
        for stage in before:
            assert run(checkout, stage).returncode == 0
        kept, started = contents(checkout), children_seconds()
        done = run(checkout, last)
        seconds = children_seconds() - started
        assert_refused(done, case.message)
        assert contents(checkout) == kept
        assert not case.reads_nothing or seconds < 1
    finally:
        for top in touched:
            target = checkout.root / top
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            shutil.move(tmp_path / top, target)


def children_seconds() -> float:
    """Processor time of finished children: what an idle machine would take, whatever else runs on this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("llama-3.2", "'llama-3.2' names a preset; DVC takes a dot for a level of the file"),
        ("smal", "model is 'smal'; must be a name under models in presets.yaml; did you mean 'small'?"),
    ],
)
def test_a_name_of_a_preset_that_dvc_cannot_find_is_refused_by_lathe_first(
    checkout: Checkout, preset: str, words: str
) -> None:
    if "." in preset:
        replace(checkout.root / "presets.yaml", lambda old: old.replace(b"\n  small:", f"\n  {preset}:".encode()))
    checkout.set({"model": preset})
    done = checkout.run("dvc", "repro", check=False)
    checkout.run("git", "checkout", "--", "presets.yaml", "params.yaml")
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "Running stage 'fetch" not in done.stdout


def test_dvc_repro_ends_with_the_line_of_the_stage_and_starts_nothing_behind_it(checkout: Checkout) -> None:
    params("learning_rate: 0.01", "learning_rate: 0")(checkout)
    done = checkout.run("dvc", "repro", check=False)
    params("learning_rate: 0", "learning_rate: 0.01")(checkout)
    assert done.returncode != 0
    assert done.stderr.count("error: params.yaml: training.learning_rate is 0; must be greater than 0") == 1
    assert "merge" not in done.stdout
    assert "Traceback" not in done.stderr


# A disk that takes no more ------------------------------------------------------------------------

WRITERS = (
    *("fetch:model", "fetch:dataset", "preprocess", "train", "merge"),
    *("convert:merged", "quantize:Q8_0", "generate:merged", "evaluate"),
)


@pytest.fixture(scope="module")
def small_disk(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout on a file system of its own, of 64 MB."""
    mounted = tmp_path_factory.mktemp("disk")
    done = mount(mounted, "-t", "tmpfs", "-o", "size=64m", "tmpfs")
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    try:
        # Without DVC's cache: the stages alone are run.
        shutil.copytree(reproduced.root, mounted / "lathe", symlinks=True, ignore=shutil.ignore_patterns("cache"))
        yield Checkout(mounted / "lathe")
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def mount(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)


def assert_refused_for_want_of_space(disk: Checkout, stage: str, *, free: int) -> None:
    """Leave so many bytes free, and run the stage."""
    filler, kept = disk.root.parent / FILLER, contents(disk)
    filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - free))
    try:
        done = run(disk, stage)
    finally:
        filler.unlink()
    assert_refused(done, "No space left on device; free some space")
    assert contents(disk) == kept


@pytest.mark.parametrize("stage", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(small_disk: Checkout, stage: str) -> None:
    assert_refused_for_want_of_space(small_disk, stage, free=0)


@pytest.mark.parametrize("stage", ["train", "merge", "convert:merged", "quantize:Q8_0"])
def test_a_disk_that_fills_up_in_the_middle_is_one_line_too(small_disk: Checkout, stage: str) -> None:
    """Forty kilobytes are less than any of these outputs; the fault then comes from Rust, C++ or numpy."""
    assert_refused_for_want_of_space(small_disk, stage, free=40960)


def test_a_checkpoint_that_finds_no_room_is_one_line(small_disk: Checkout) -> None:
    """The adapter takes 200 kB, the optimizer's state twice that: the fault comes from torch."""
    small_disk.set({"training.save_steps": 1})
    filler, adapter = small_disk.root.parent / FILLER, small_disk.root / "models/adapter/adapter_model.safetensors"
    kept = adapter.read_bytes()
    filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - 400_000))
    try:
        done = run(small_disk, "train")
    finally:
        filler.unlink()
        small_disk.set({"training.save_steps": 50})
    assert_refused(done, "No space left on device; free some space")
    assert adapter.read_bytes() == kept
    assert not list((small_disk.root / ".scratch").rglob("optimizer.pt"))


@pytest.mark.parametrize("stage", WRITERS)
def test_a_read_only_folder_is_one_line(small_disk: Checkout, stage: str) -> None:
    kept = contents(small_disk)
    assert mount(small_disk.root.parent, "-o", "remount,ro").returncode == 0
    try:
        done = run(small_disk, stage)
    finally:
        assert mount(small_disk.root.parent, "-o", "remount,rw").returncode == 0
    assert_refused(done, "Read-only file system; the file system is read-only; run in a folder")
    assert contents(small_disk) == kept


@pytest.mark.parametrize(
    ("key", "others", "name", "item"),
    [
        ("quantize.types", ["Q8_0"], "../../schemas/victim", "quantize@../../schemas/victim"),
        ("quantize.types", ["Q8_0"], "../../../victim", "quantize@../../../victim"),
        ("quantize.types", ["Q8_0"], "$(touch ../victim.json)Q8_0", "quantize@$(touch ../victim.json)Q8_0"),
        ("export.formats", [], "../../../victim", "export@../../../victim"),
        ("export.formats", [], "$(touch ../victim.json)", "export@$(touch ../victim.json)"),
        ("benchmark.tasks", [], "../../../schemas/victim", "benchmark@../../../schemas/victim-base"),
        ("benchmark.tasks", [], "$(touch ../victim.json)", "benchmark@$(touch ../victim.json)-base"),
    ],
)
def test_a_type_that_is_a_path_or_a_command_removes_and_runs_nothing(
    reproduced: Checkout, tmp_path: Path, key: str, others: list[str], name: str, item: str
) -> None:
    """DVC removes what a stage writes before it runs, but takes no two stages that would write one file."""
    checkout = copy_of(reproduced, tmp_path / "lathe")
    precious = [tmp_path / "victim.gguf", tmp_path / "victim", checkout.root / "schemas/victim.json"]
    for file in precious:
        file.write_text("precious")
    checkout.set({key: [*others, name]})
    for command in (("repro",), ("repro", item), ("exp", "run")):
        done = checkout.run("dvc", *command, check=False)
        assert done.returncode != 0
        said = ("is no quantization type", "is no format", "overlapping output", "files are named")
        assert any(text in done.stderr for text in said)
        assert [file for file in precious if not file.exists()] == []
        assert not (tmp_path / "victim.json").exists()


def test_every_stage_alone_refuses_a_name_that_is_a_path_before_it_writes_anything(checkout: Checkout) -> None:
    """As `dvc repro --single-item` starts it: nothing has looked at the parameters before."""
    root, outside = checkout.root, "../../../victim"
    checkout.set({"quantize.types": ["Q8_0", outside], "benchmark.tasks": [outside], "sampling.files": [outside]})
    checkout.set({"export.formats": [outside]})
    options: dict[str, tuple[str, ...]] = {"quantize": ("--type", outside), "sample": ("--file", outside)}
    options |= dict.fromkeys(("export", "generate_exported"), ("--format", outside))
    options["benchmark"] = ("--task", outside, "--artifact", "base")

    def list_all() -> set[str]:
        return {path.as_posix() for path in root.parent.rglob("*") if "__pycache__" not in path.parts}

    before = list_all()
    scripts = sorted(file.stem for file in (root / "stages").glob("[a-z]*.py"))
    assert len(scripts) > 15
    for name in scripts:
        done = checkout.stage(name, *options.get(name, ()), check=False)
        assert done.returncode == 2, f"{name}: {done.stderr}"
        for key in ("quantize.types", "export.formats", "benchmark.tasks"):
            assert key in done.stderr, f"{name}: {done.stderr}"
        assert "Traceback" not in done.stderr
        assert list_all() == before, name
    checkout.run("git", "checkout", "--", "params.yaml")
