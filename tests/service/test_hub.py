# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""`fetch` from the hub: the real script and the real client against a server on 127.0.0.1."""

import fcntl
import gzip
import hashlib
import io
import json
import os
import pty
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from conftest import SMALL, Checkout, make_checkout
from gguf_models import Made, make_llama, make_llama3, make_qwen3, tiny  # noqa: F401 - a fixture
from hub_server import GOOD_TOKEN, Fault, Hub
from ruamel.yaml import YAML

from lathe.config import artifacts
from lathe.experiments import recipes
from lathe.gguf.description import describe_gguf

MODEL = "owner/model"
DATASET = "owner/rows"
CHUNK = 10 * 1024 * 1024  # what the client writes at a time: less than this of a broken download is lost


def make_model_files() -> dict[str, bytes]:
    """The files of a random Llama of a few thousand weights with a SentencePiece vocabulary, by their names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_llama(folder, lambda model: None, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


REAL_FILES = make_model_files()


def weights(megabytes: float, name: str = "weight") -> bytes:
    """A safetensors file of that model's tensors, and one of noise that nothing reads."""
    noise = random.Random(1).randbytes(int(megabytes * 1024 * 1024))
    tensors = safetensors.torch.load(REAL_FILES["model.safetensors"])
    return safetensors.torch.save({**tensors, name: torch.frombuffer(bytearray(noise), dtype=torch.uint8)})


MODEL_FILES = {
    **REAL_FILES,
    "generation_config.json": b'{"eos_token_id": 2}',
    "LICENSE": b"Apache-2.0",
    "README.md": b"# A model",
    "model.safetensors": weights(0.1),
}
UNWANTED_FILES = {
    ".gitattributes": b"*.bin filter=lfs",
    "pytorch_model.bin": b"pickled",
    "training_args.bin": b"pickled",
    "modeling_mine.py": b"raise SystemExit('run')",
    "tokenizer_mine.py": b"raise SystemExit('run')",
    "tokenizer.pkl": b"pickled",
    "original/consolidated.safetensors": b"twice",
    "onnx/model.onnx": b"onnx",
    "consolidated.safetensors": b"twice",
    "model.fp16.safetensors": b"twice",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("hub") / "lathe")


class User:
    """Someone with a checkout and a hub cache."""

    def __init__(self, checkout: Checkout, hub: Hub, home: Path) -> None:
        self.checkout, self.hub, self.cache = checkout, hub, home / "hub"
        kept = {name: value for name, value in checkout.environment.items() if not name.startswith("HF_")}
        self.environment = checkout.environment = {
            **kept,
            "HF_HOME": str(home),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }

    def choose(self, item: str, **preset: Any) -> None:
        file = self.checkout.root / "presets.yaml"
        tree = YAML().load(file)
        tree[f"{item}s"]["chosen"] = {"source": "hub", "id": MODEL if item == "model" else DATASET, **preset}
        YAML().dump(tree, file)
        self.checkout.set({item: "chosen"})

    def fetch(self, item: str, *, check: bool = True, **preset: Any) -> subprocess.CompletedProcess[str]:
        self.choose(item, **preset)
        done = self.checkout.stage("fetch", item, check=check)
        if done.returncode == 0:
            self.checkout.set({"model": "tiny", "dataset": "commands"})
        return done

    def drop(self, item: str, key: str) -> None:
        file = self.checkout.root / "presets.yaml"
        tree = YAML().load(file)
        del tree[f"{item}s"]["chosen"][key]
        YAML().dump(tree, file)

    def refused(self, item: str = "model", **preset: Any) -> str:
        """Return the one line of a refusal."""
        done = self.fetch(item, check=False, **preset)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert done.stderr.splitlines()[-1] == errors[0], "something was said after the refusal"
        return errors[0].removeprefix("error: ")

    def file(self, path: str) -> Path:
        return self.checkout.root / path

    def partials(self) -> list[Path]:
        return list(self.cache.rglob("*.incomplete"))


@pytest.fixture
def user(shared: Checkout, hub: Hub, tmp_path: Path) -> Iterator[User]:
    environment = shared.environment
    yield User(shared, hub, tmp_path / "home")
    shared.environment = environment
    shared.run("git", "checkout", "--quiet", ".")
    for folder in ("models/base", "data/raw"):
        shutil.rmtree(shared.root / folder, ignore_errors=True)


def named(**keys: str | None) -> dict[str, Any]:
    """Leave out what is None."""
    return {key: value for key, value in keys.items() if value}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = [{"question": f"{i} + {i}?", "answer": f"{2 * i}"} for i in range(40)]


# Models.


def test_a_gguf_file_of_a_repository_is_downloaded_alone_and_dequantized(user: User, tiny: Made) -> None:
    files = MODEL_FILES | {"small-Q8_0.gguf": tiny.gguf.read_bytes(), "small-Q4_0.gguf": b"another"}
    user.hub.add("model", MODEL, files)
    said = user.refused("model", file="small-Q8.gguf")
    assert said == (
        f"presets.yaml: file is 'small-Q8.gguf', but {MODEL} has no such file; did you mean 'small-Q8_0.gguf'?"
    )
    assert not user.file("models/base").exists()
    user.fetch("model", file="small-Q8_0.gguf")
    assert names(user.file("models/base")) == [
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    ]
    assert len(user.hub.blobs) == 1, "another file was downloaded"
    [origin] = user.checkout.json("metrics/fetch/model.json")["origin"]
    assert origin["id"] == MODEL
    assert origin["gguf"] == "small-Q8_0.gguf"
    assert origin["sha256"] == hashlib.sha256(tiny.gguf.read_bytes()).hexdigest()
    user.hub.requests.clear()
    user.fetch("model", file="small-Q8_0.gguf", revision=origin["commit"])
    assert not user.hub.requests


def test_a_gguf_file_that_is_no_model_leaves_nothing(user: User) -> None:
    user.hub.add("model", MODEL, {"small.gguf": b"GGUF" + bytes(100)})
    said = user.refused("model", file="small.gguf")
    assert "its GGUF header is damaged" in said
    assert not user.file("models/base").exists()
    assert not list(user.file("models").glob(".base*")), "something was left half-written"


def test_a_pinned_model_is_fetched_whole_without_pickles_code_or_second_copies(user: User) -> None:
    repository = user.hub.add("model", MODEL, MODEL_FILES | UNWANTED_FILES)
    commit = repository.refs["main"]
    repository.commit({"config.json": b"a later commit"})
    done = user.fetch("model", revision=commit)
    assert "pinned" not in done.stderr
    base = user.file("models/base")
    assert names(base) == sorted(MODEL_FILES)
    assert all((base / name).read_bytes() == data for name, data in MODEL_FILES.items())
    assert not user.hub.asked(r"resolve/.*(bin|py|pkl|onnx|consolidated|fp16)")
    size = sum(map(len, MODEL_FILES.values()))
    assert user.checkout.json("metrics/fetch/model.json")["origin"][0] == {
        "name": "chosen",
        "source": "hub",
        "id": MODEL,
        "revision": commit,
        "commit": commit,
        "files": len(MODEL_FILES),
        "bytes": size,
    }


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_branch_or_tag_is_resolved_and_the_line_that_pins_it_is_printed(user: User, revision: str | None) -> None:
    repository = user.hub.add("model", MODEL, MODEL_FILES)
    commit = repository.commit(MODEL_FILES | {"LICENSE": b"of the tag"}, ref=revision or "main")
    done = user.fetch("model", **named(revision=revision))
    assert f"\n    revision: {commit}\n" in done.stderr
    assert user.checkout.json("metrics/fetch/model.json")["origin"][0]["revision"] == revision
    assert user.checkout.json("metrics/fetch/model.json")["origin"][0]["commit"] == commit
    assert user.file("models/base/LICENSE").read_bytes() == b"of the tag"


def test_of_a_sharded_model_the_files_of_its_index_are_taken(user: User) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names_of_tensors = [*safetensors.torch.load(REAL_FILES["model.safetensors"]), "a"]
    weight_map = {**dict.fromkeys(names_of_tensors, shards[0]), "b": shards[1]}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    second = safetensors.torch.save({"b": torch.zeros(1000)})
    files = {name: data for name, data in MODEL_FILES.items() if name != "model.safetensors"}
    files |= {"model.safetensors.index.json": index, shards[0]: weights(0.1, "a"), shards[1]: second}
    user.hub.add("model", MODEL, files | {"consolidated.safetensors": b"twice"})
    user.fetch("model")
    assert names(user.file("models/base")) == sorted(files)

    user.hub.add("model", MODEL, {name: data for name, data in files.items() if name != shards[1]})
    assert user.refused() == (
        f"{MODEL}: holds no {shards[1]}, which model.safetensors.index.json names; give a complete model"
    )


def test_a_repository_with_pickles_alone_is_refused_before_anything_is_downloaded(user: User) -> None:
    files = {name: data for name, data in MODEL_FILES.items() if name != "model.safetensors"}
    user.hub.add("model", MODEL, files | {"pytorch_model.bin": b"pickled"})
    assert "pytorch_model.bin: pickled weights are never loaded" in user.refused()
    assert not user.hub.asked("resolve")


def make_adapter_files(base: str, **config: str) -> dict[str, bytes]:
    """An adapter of that model with weights that are not zero, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in REAL_FILES.items():
            (folder / file).write_bytes(data)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        adapted.save_pretrained(folder / "adapter")
        content = json.loads((folder / "adapter/adapter_config.json").read_text())
        content |= {"base_model_name_or_path": base, **config}
        (folder / "adapter/adapter_config.json").write_text(json.dumps(content))
        return {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}


def test_an_adapter_is_taken_with_the_base_that_it_names(user: User) -> None:
    pinned = user.hub.add("model", MODEL, MODEL_FILES).refs["main"]
    files = make_adapter_files(MODEL, revision=pinned)
    commit = user.hub.add("model", "owner/adapter", files | {"README.md": b"of the adapter"}).refs["main"]
    user.fetch("model", id="owner/adapter")
    before, taken = (safetensors.torch.load(data) for data in (MODEL_FILES["model.safetensors"], fetched(user)))
    assert {name for name in before if not torch.equal(before[name], taken[name])} == {
        "model.layers.0.self_attn.q_proj.weight"
    }
    [origin] = user.checkout.json("metrics/fetch/model.json")["origin"]
    assert (origin["id"], origin["commit"]) == ("owner/adapter", commit)
    assert (origin["base"], origin["base_commit"]) == (MODEL, pinned)

    folder = user.file("models/local/adapter")
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for preset in (
        {"source": "local", "path": "models/local/adapter"},
        {"source": "hub", "id": MODEL, "revision": pinned, "adapter": "models/local/adapter"},
    ):
        user.choose("model", **preset)
        if preset["source"] == "local":
            user.drop("model", "id")
        user.checkout.stage("fetch", "model")
        again = safetensors.torch.load(fetched(user))
        assert all(torch.equal(again[name], taken[name]) for name in taken)
        [origin] = user.checkout.json("metrics/fetch/model.json")["origin"]
        assert (origin["id"], origin["commit"], origin["adapter"]) == (MODEL, pinned, "models/local/adapter")
    user.checkout.stage("local_files", "model")
    listed = user.checkout.json("metrics/local_files/model.json")["files"]
    assert {file["path"] for file in listed} == {f"models/local/adapter/{name}" for name in files}


def fetched(user: User) -> bytes:
    return (user.file("models/base") / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("/home/me/base", "is an adapter of PEFT, whose base '/home/me/base' is neither"),
        ("owner/none", "owner/adapter, an adapter of owner/none: "),
    ],
)
def test_an_adapter_whose_base_is_not_there_is_refused(user: User, base: str, said: str) -> None:
    user.hub.add("model", "owner/adapter", make_adapter_files(base))
    assert said in user.refused(id="owner/adapter")
    assert not user.file("models/base").exists()
    assert not list(user.file("models").glob(".base*"))


# Large files, and what can happen to them on the way.


def test_a_download_cut_in_the_middle_is_resumed_where_it_stopped(user: User) -> None:
    data = weights(24)
    user.hub.add("model", MODEL, MODEL_FILES | {"model.safetensors": data})
    user.hub.faults = [Fault(r"GET /[0-9a-f]{64}\?", cut_after=CHUNK + 5_000_000, times=1)]
    user.fetch("model")
    ranges = [request.headers.get("range") for request in user.hub.requests if request.server == "cdn"]
    assert f"bytes={CHUNK}-" in ranges
    assert user.file("models/base/model.safetensors").read_bytes() == data


def test_a_run_that_was_killed_is_resumed_by_the_next(user: User) -> None:
    data = weights(24)
    commit = user.hub.add("model", MODEL, MODEL_FILES | {"model.safetensors": data}).refs["main"]
    user.hub.faults = [Fault(r"GET /[0-9a-f]{64}\?.*", stall_after=2 * CHUNK + 1000, times=100)]
    user.choose("model", revision=commit)
    running = subprocess.Popen(
        [sys.executable, "stages/fetch.py", "model"], cwd=user.checkout.root, env=user.environment
    )
    wait_until(lambda: [partial.stat().st_size for partial in user.partials()] == [2 * CHUNK])
    running.kill()
    running.wait()

    user.hub.requests.clear()
    user.hub.faults.clear()
    user.fetch("model", revision=commit)
    asked = user.hub.asked(f"GET /{hashlib.sha256(data).hexdigest()}")
    assert [request.headers.get("range") for request in asked] == [f"bytes={2 * CHUNK}-"]
    assert user.file("models/base/model.safetensors").read_bytes() == data
    assert not user.partials()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_what_comes_with_another_hash_is_refused_removed_and_downloaded_anew_by_the_next_run(user: User) -> None:
    user.hub.add("model", MODEL, MODEL_FILES)
    for pattern, path in ((r"GET /[0-9a-f]{64}", "model.safetensors"), (r"GET .*/resolve-cache/.*/LICENSE", "LICENSE")):
        user.hub.faults = [Fault(pattern, corrupt=True)]
        assert "came with another hash than the hub announced" in user.refused()
        assert not user.file("models/base").exists()
        assert not user.partials()
        user.hub.faults.clear()
        user.fetch("model")
        assert (user.file("models/base") / path).read_bytes() == MODEL_FILES[path]
        shutil.rmtree(user.cache)
        shutil.rmtree(user.file("models/base"))


@pytest.mark.parametrize("path", [None, "model.safetensors", "LICENSE"], ids=["commit", "large file", "small file"])
def test_a_hash_that_is_a_path_is_refused_and_nothing_is_written_outside_of_the_cache(
    user: User, tmp_path: Path, path: str | None
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    outside = "../" * 30 + str(victim)[1:]
    repository = user.hub.add("model", MODEL, MODEL_FILES)
    if path is None:
        repository.commits[outside] = MODEL_FILES
        repository.refs["main"] = outside
    else:
        repository.announced_hashes[path] = outside
    assert "where a hash belongs; use another hub or repository" in user.refused()
    assert victim.read_text() == "precious"
    assert not victim.with_suffix(".incomplete").exists()
    assert not user.file("models/base").exists()


def test_a_file_without_end_takes_no_more_of_the_disk_than_was_announced(user: User) -> None:
    user.hub.add("model", MODEL, {**MODEL_FILES, "model.safetensors": weights(11)})
    user.hub.faults = [Fault(r"GET /[0-9a-f]{64}", endless=True)]
    assert "model.safetensors came in another size than the hub announced" in user.refused()
    assert not user.partials()
    assert sum(file.stat().st_size for file in user.cache.rglob("*") if file.is_file()) < 1 << 20


def test_the_hub_is_asked_once_for_the_names_that_become_paths(user: User) -> None:
    user.hub.add("model", MODEL, MODEL_FILES)
    user.fetch("model")
    listings = user.hub.asked(r"/tree/")
    assert len({request.line for request in listings}) == len(listings)
    assert not user.hub.asked("^HEAD ")  # its ETag and commit would be names too


@pytest.mark.parametrize("pattern", ["/revision/", "/tree/"])
def test_an_answer_without_end_is_refused(user: User, pattern: str) -> None:
    user.hub.add("model", MODEL, MODEL_FILES)
    user.hub.faults = [Fault(pattern, endless=True)]
    assert user.refused() == "127.0.0.1: the hub's answer has not ended after 64 MiB; use another hub or mirror"
    assert not user.file("models/base").exists()


@pytest.mark.parametrize("pattern", ["/revision/", "/tree/"])
def test_an_answer_that_is_no_json_is_told(user: User, pattern: str) -> None:
    user.hub.add("model", MODEL, MODEL_FILES)
    user.hub.faults = [Fault(pattern, corrupt=True)]
    assert user.refused().startswith(f"{MODEL}: the hub's answer cannot be read (")


@pytest.mark.parametrize("path", ["../tokenizer.json", "/tokenizer.json", "a//b.json", "tokenizer\0.json"])
def test_a_name_that_lies_outside_is_refused(user: User, path: str) -> None:
    user.hub.add("model", MODEL, {**MODEL_FILES, path: b"{}"})
    assert "would lie outside of its folder" in user.refused()


def test_a_file_damaged_in_the_cache_is_found_and_downloaded_anew(user: User) -> None:
    commit = user.hub.add("model", MODEL, MODEL_FILES).refs["main"]
    user.fetch("model", revision=commit)
    [blob] = [
        file for file in user.cache.rglob("blobs/*") if file.stat().st_size == len(MODEL_FILES["model.safetensors"])
    ]
    blob.unlink()
    blob.write_bytes(b"damaged")
    done = user.fetch("model", revision=commit)
    assert f"{MODEL}: model.safetensors in the cache is damaged" in done.stderr
    assert user.file("models/base/model.safetensors").read_bytes() == MODEL_FILES["model.safetensors"]


def test_what_comes_in_another_size_is_refused_and_removed(user: User) -> None:
    repository = user.hub.add("model", MODEL, MODEL_FILES)
    repository.announced_sizes["model.safetensors"] = 5
    assert user.refused() == (
        f"{MODEL}: model.safetensors came in another size than the hub announced (5 bytes); it is removed, run again "
        "to download it"
    )
    assert not user.partials()


def test_too_little_disk_is_told_before_anything_is_downloaded(user: User) -> None:
    repository = user.hub.add("model", MODEL, MODEL_FILES)
    repository.announced_sizes["model.safetensors"] = 10**18
    line = user.refused()
    assert line.startswith(f"{MODEL} takes 1,000,000 TB in {user.cache}, where ")
    assert line.endswith("are free; free some, or set HF_HOME to a folder on a larger disk")
    assert not user.hub.asked("GET .*safetensors")


# What the hub may answer instead.


def test_a_wrong_name_is_told_with_and_without_a_token(user: User) -> None:
    assert user.refused(id="owner/modle") == (
        f"owner/modle: no such model on {user.hub.endpoint}, or not a public one; check `id` in presets.yaml, or set "
        f"HF_TOKEN to a token that may read it ({user.hub.endpoint}/settings/tokens)"
    )
    user.environment["HF_TOKEN"] = GOOD_TOKEN
    assert user.refused(id="owner/modle") == (
        f"owner/modle: no such model on {user.hub.endpoint}, or the account of HF_TOKEN may not see it; check `id` in "
        "presets.yaml"
    )
    assert f"no such dataset on {user.hub.endpoint}" in user.refused("dataset", id="owner/modle", train_split="train")


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_a_wrong_revision_is_told(user: User, revision: str) -> None:
    user.hub.add("model", MODEL, MODEL_FILES)
    assert user.refused(revision=revision) == (
        f"{MODEL} has no revision {revision!r}; give a commit, tag or branch from "
        f"{user.hub.endpoint}/{MODEL}/commits/main"
    )


def test_a_gated_repository_is_told_with_and_without_a_token_and_given_to_whom_may(user: User) -> None:
    repository = user.hub.add("model", MODEL, MODEL_FILES)
    repository.gated = True
    page = f"{MODEL} is gated; accept its terms at {user.hub.endpoint}/{MODEL}"
    assert user.refused() == f"{page} and set HF_TOKEN to a token of that account"
    user.environment["HF_TOKEN"] = GOOD_TOKEN
    assert user.refused() == f"{page} with the account of your token"
    repository.granted = True
    user.fetch("model")
    assert names(user.file("models/base")) == sorted(MODEL_FILES)


def test_a_token_that_is_not_accepted_or_may_not_read_is_told(user: User) -> None:
    user.hub.add("model", MODEL, MODEL_FILES)
    user.environment["HF_TOKEN"] = "hf_expired"
    assert "the hub does not accept the token of HF_TOKEN; make a new one at" in user.refused()
    user.environment["HF_TOKEN"] = GOOD_TOKEN
    user.hub.faults = [Fault("/api/models/", status=403)]
    assert "the token of HF_TOKEN may not read it (403); give it read access at" in user.refused()


@pytest.mark.parametrize("status", [429, 500])
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(user: User, status: int) -> None:
    commit = user.hub.add("model", MODEL, MODEL_FILES).refs["main"]
    user.hub.faults = [
        Fault(pattern, status=status, headers={"Retry-After": "0"}, times=1)
        for pattern in (
            "/api/models/owner/model/revision",
            "/tree/",
            "GET .*/resolve/.*/config.json",
        )
    ]
    user.fetch("model", revision=commit)
    assert names(user.file("models/base")) == sorted(MODEL_FILES)
    assert [fault.times for fault in user.hub.faults] == [0, 0, 0]


def test_a_hub_that_stays_busy_or_broken_is_told_after_some_tries(user: User) -> None:
    user.hub.add("model", MODEL, MODEL_FILES)
    user.hub.faults = [Fault("/api/models/", status=429, headers={"Retry-After": "3600"})]
    assert user.refused() == (
        f"{MODEL}: the hub takes no more requests for now (429); run again in 3600 s; with HF_TOKEN set the hub allows "
        "more"
    )
    user.hub.requests.clear()
    user.hub.faults = [Fault("/api/models/", status=500, headers={"Retry-After": "0"})]
    assert user.refused() == (
        f"{MODEL}: the hub answers 500 (Internal Server Error); run again later, what is downloaded is kept"
    )
    assert len(user.hub.asked("/api/models/")) == 4


def test_no_hub_at_all_is_told(user: User) -> None:
    user.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    for preset in ({}, {"revision": "0" * 40}):
        assert user.refused(**preset) == (
            f"{MODEL}: no answer from http://127.0.0.1:9 ([Errno 111] Connection refused); check the network, and "
            "HTTPS_PROXY and HF_ENDPOINT where they are set"
        )


# The user's own cache.


def cached_by_another_tool(user: User, commit: str) -> None:
    """Fill the cache as `from_pretrained` does: file by file, without a listing."""
    program = "import sys, huggingface_hub as h\nfor path in sys.argv[3:]: h.hf_hub_download(*sys.argv[1:2], path, {})"
    user.checkout.run("python", "-c", program.format("revision=sys.argv[2]"), MODEL, commit, *MODEL_FILES)


def test_a_model_in_the_users_cache_is_linked_without_a_network(user: User) -> None:
    commit = user.hub.add("model", MODEL, MODEL_FILES).refs["main"]
    cached_by_another_tool(user, commit)
    user.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    user.fetch("model", revision=commit)
    for name in MODEL_FILES:
        cached = next(user.cache.rglob(f"snapshots/{commit}/{name}"))
        # DVC makes what is linked read-only: the weights alone are.
        assert user.file(f"models/base/{name}").samefile(cached) == name.endswith(".safetensors")
        assert user.file(f"models/base/{name}").read_bytes() == cached.read_bytes()
        assert not user.file(f"models/base/{name}").is_symlink()


def test_a_model_in_the_users_cache_is_not_downloaded_again(user: User) -> None:
    commit = user.hub.add("model", MODEL, MODEL_FILES).refs["main"]
    cached_by_another_tool(user, commit)
    user.hub.requests.clear()
    user.fetch("model", revision=commit)
    assert not user.hub.asked("resolve")


@pytest.mark.parametrize("how", ["no hub", "HF_HUB_OFFLINE"])
def test_what_was_fetched_once_is_fetched_again_offline_and_the_branch_is_not_guessed(user: User, how: str) -> None:
    commit = user.hub.add("model", MODEL, MODEL_FILES).refs["main"]
    user.fetch("model", revision="main")
    shutil.rmtree(user.file("models/base"))
    if how == "no hub":
        user.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    else:
        user.environment["HF_HUB_OFFLINE"] = "1"
    user.hub.requests.clear()
    user.fetch("model", revision=commit)
    assert names(user.file("models/base")) == sorted(MODEL_FILES)
    line = user.refused(revision="main")
    assert line.endswith(f"; to use what the cache has of it, pin its entry in presets.yaml: `revision: {commit}`")
    assert not user.hub.requests


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system to keep the cache on")
def test_a_cache_on_another_file_system_is_copied_from(user: User) -> None:
    commit = user.hub.add("model", MODEL, MODEL_FILES).refs["main"]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        user.environment["HF_HOME"] = home
        user.fetch("model", revision=commit)
    base = user.file("models/base")
    assert {file.name: file.read_bytes() for file in base.iterdir()} == MODEL_FILES


def test_a_cache_that_holds_but_a_part_is_completed(user: User) -> None:
    repository = user.hub.add("model", MODEL, MODEL_FILES)
    commit = repository.refs["main"]
    cached_by_another_tool(user, commit)
    later = repository.commit(MODEL_FILES | {"LICENSE": b"another"})
    user.hub.requests.clear()
    user.fetch("model", revision=later)
    assert len(user.hub.asked("GET .*/resolve/")) == 1


# Secrets and progress.


def test_the_token_goes_to_the_hub_alone_and_is_never_printed_or_kept(user: User) -> None:
    user.hub.add("model", MODEL, MODEL_FILES).gated = True
    user.hub.repositories["model", MODEL].granted = True
    user.environment |= {"HF_TOKEN": GOOD_TOKEN, "LATHE_LOG_LEVEL": "debug", "HF_DEBUG": "1"}
    user.hub.faults = [Fault(r"GET /[0-9a-f]{64}\?", cut_after=10, times=1)]
    done = user.fetch("model")
    by_server = {
        server: {request.headers.get("authorization") for request in user.hub.requests if request.server == server}
        for server in ("hub", "cdn")
    }
    assert by_server == {"hub": {f"Bearer {GOOD_TOKEN}"}, "cdn": {None}}
    assert GOOD_TOKEN not in done.stdout + done.stderr
    folders = [user.file(name) for name in ("models", "data", "metrics")] + [user.cache.parent]
    kept = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in kept if GOOD_TOKEN.encode() in file.read_bytes()]


def test_without_a_terminal_progress_comes_as_lines(user: User) -> None:
    user.hub.add("model", MODEL, MODEL_FILES)
    done = user.fetch("model")
    assert "\r" not in done.stderr
    assert re.search(rf"INFO lathe.common.progress: {MODEL}: 0 kB of [\d.]+ kB, \? s left\n", done.stderr)
    assert re.search(rf"INFO lathe.common.progress: {MODEL}: ([\d.]+ kB) of \1, 0 s left\n", done.stderr)


def test_on_a_terminal_a_bar_tells_how_long_it_will_take(user: User) -> None:
    user.hub.add("model", MODEL, MODEL_FILES | {"model.safetensors": weights(24)})
    user.hub.faults = [Fault(r"GET /[0-9a-f]{64}\?", cut_after=CHUNK + 1000, times=1)]
    user.choose("model")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    running = subprocess.Popen(
        [sys.executable, "stages/fetch.py", "model"], cwd=user.checkout.root, env=user.environment, stderr=theirs
    )
    os.close(theirs)
    shown = ""
    while piece := read_terminal(ours):
        shown += piece
    assert running.wait() == 0, shown
    assert re.search(rf"\r{MODEL}: +\d+%\|.*\d+.\dM/25.\dM \[\d\d:\d\d<\d\d:\d\d, ", shown), shown


def read_terminal(descriptor: int) -> str:
    try:
        return os.read(descriptor, 1 << 16).decode()
    except OSError:  # how Linux tells that the other end is closed
        return ""


# Datasets.


def test_the_files_of_a_configuration_are_linked_under_the_names_of_their_splits(user: User) -> None:
    card = {
        "configs": [
            {
                "config_name": name,
                "data_files": [
                    {"split": "train", "path": f"{name}/train-*"},
                    {"split": "holdout", "path": f"{name}/test-*"},
                ],
            }
            for name in ("main", "socratic")
        ]
    }
    files = {
        f"{name}/{part}.parquet": parquet([{"question": f"{name} {part}", "answer": "1"}])
        for name in ("main", "socratic")
        for part in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    }
    readme = f"---\n{json.dumps(card)}\n---\n# Rows\n".encode()
    commit = user.hub.add(
        "dataset", DATASET, files | {"README.md": readme, "rows.py": b"raise SystemExit('run')"}
    ).refs["main"]
    done = user.fetch("dataset", revision=commit, config="main", train_split="train", test_split="holdout")
    assert "rows.py is not run" in done.stderr
    raw = user.file("data/raw")
    assert names(raw) == ["test.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert (raw / "train-00001-of-00002.parquet").read_bytes() == files["main/train-00001-of-00002.parquet"]
    assert (raw / "test.parquet").samefile(next(user.cache.rglob("main/test-00000-of-00001.parquet")))
    assert not user.hub.asked("resolve/.*(socratic|rows.py)")
    assert user.checkout.json("metrics/fetch/dataset.json")["origin"][0] == {
        "name": "chosen",
        "source": "hub",
        "id": DATASET,
        "revision": commit,
        "commit": commit,
        "files": 3,
        "bytes": sum(len(data) for path, data in files.items() if path.startswith("main/")),
    }

    # Again without a hub; and what the repository does not have is told.
    user.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    user.fetch("dataset", revision=commit, config="main", train_split="train", test_split="holdout")
    assert user.refused("dataset", revision=commit, train_split="train") == (
        f"presets.yaml: {DATASET} has several configurations; choose one with `config:`: main, socratic"
    )
    assert user.refused("dataset", revision=commit, config="mian", train_split="train") == (
        f"presets.yaml: config is 'mian', which {DATASET} has not; did you mean 'main'?"
    )
    assert user.refused("dataset", revision=commit, config="main", train_split="train", test_split="test") == (
        f"presets.yaml: test_split is 'test', but {DATASET} has no split 'test'; known: holdout, train"
    )


def test_with_a_limit_no_more_files_are_downloaded_than_hold_the_rows(user: User) -> None:
    shards = {
        f"data/train-{part:05d}-of-00012.parquet": parquet(
            [{"question": f"{part} {number}", "answer": "1"} for number in range(4000)]
        )
        for part in range(12)
    }
    user.hub.add("dataset", DATASET, shards)
    done = user.fetch("dataset", train_split="train", limits={"train": 100})
    assert "5 of 12 files hold enough rows for the limit" in done.stderr
    downloaded = {path for path in shards if user.hub.asked(f"resolve/.*{path}")}
    assert sorted(int(path.partition("-")[2][:5]) for path in downloaded) == [0, 2, 4, 7, 9]
    assert len(names(user.file("data/raw"))) == 5


def test_a_file_with_no_split_in_its_name_is_the_training_split(user: User) -> None:
    infos = b'{"owner--rows": {"description": "", "splits": {"train": {"name": "train", "num_examples": 40}}}}'
    files = {"databricks-rows-15k.jsonl": jsonl(ROWS), "README.md": b"# Rows", "dataset_infos.json": infos}
    user.hub.add("dataset", DATASET, files)
    user.fetch("dataset", train_split="train")
    assert names(user.file("data/raw")) == ["train.jsonl"]
    assert user.file("data/raw/train.jsonl").read_bytes() == jsonl(ROWS)


def test_a_slice_or_another_format_becomes_the_same_parquet_every_time(user: User) -> None:
    readme = (
        b'---\nconfigs:\n- config_name: default\n  sep: ";"\n  data_files:\n  - split: train\n    path: rows.csv\n---\n'
    )
    table = "question;answer\n" + "".join(f"{row['question']};{row['answer']}\n" for row in ROWS)
    cases: list[tuple[dict[str, bytes], dict[str, Any], dict[str, int]]] = [
        (
            {"train.jsonl": jsonl(ROWS)},
            {"train_split": "train[:75%]", "validation_split": "train[30:35]", "test_split": "train[-5:]"},
            {"train": 30, "validation": 5, "test": 5},
        ),
        ({"train.json": jsonl(ROWS), "test.json": json.dumps(ROWS).encode()}, {"train_split": "train"}, {"train": 40}),
        ({"train.jsonl.gz": gzip.compress(jsonl(ROWS))}, {"train_split": "train"}, {"train": 40}),
        ({"rows.csv": table.encode(), "README.md": readme}, {"train_split": "train"}, {"train": 40}),
    ]
    for files, splits, counts in cases:
        user.hub.add("dataset", DATASET, files)
        seen = []
        for _ in range(2 if "validation" in counts else 1):
            user.fetch("dataset", **splits)
            raw = user.file("data/raw")
            assert names(raw) == sorted(f"{split}.parquet" for split in counts)
            tables = {split: pyarrow.parquet.read_table(raw / f"{split}.parquet") for split in counts}
            assert {split: table.num_rows for split, table in tables.items()} == counts
            assert tables["train"]["question"][7].as_py() == "7 + 7?"
            seen.append({name: (raw / name).read_bytes() for name in names(raw)})
            shutil.rmtree(user.cache.parent)
        assert seen[0] == seen[-1]


def test_the_configurations_of_the_hubs_own_conversion_are_not_mixed(user: User) -> None:
    repository = user.hub.add("dataset", DATASET, {"rows.py": b"raise SystemExit('run')"})
    files = {f"{name}/train/{i:04d}.parquet": parquet([{"row": f"{name} {i}"}]) for name in "ab" for i in range(2)}
    repository.commit(files, ref="refs/convert/parquet")
    user.fetch("dataset", revision="refs/convert/parquet", config="b", train_split="train")
    found = [(user.file("data/raw") / name).read_bytes() for name in names(user.file("data/raw"))]
    assert found == [files["b/train/0000.parquet"], files["b/train/0001.parquet"]]


@pytest.mark.parametrize(
    ("files", "splits", "message"),
    [
        (
            {"rows.py": b"raise SystemExit('run')", "README.md": b"# Rows"},
            {"train_split": "train"},
            f"{DATASET}: holds no data files that can be read (",
        ),
        (
            {"train.jsonl": jsonl(ROWS), "README.md": b"---\nconfigs: [\n---\n# Rows"},
            {"train_split": "train"},
            f"{DATASET}: holds no data files that can be read (while parsing",
        ),
        (
            {"train.png": b"png"},
            {"train_split": "train"},
            f"{DATASET}: its files are for the builder 'imagefolder', not rows of text",
        ),
        (
            {"train.jsonl": jsonl(ROWS)},
            {"train_split": "train[50:60]"},
            f"presets.yaml: train_split is 'train[50:60]', but {DATASET} cannot give it: ",
        ),
        (
            {"train.json": b'[{"question": 1}, {"quest'},
            {"train_split": "train"},
            f"presets.yaml: train_split is 'train', but {DATASET} cannot give it: ",
        ),
    ],
)
def test_a_dataset_that_cannot_be_read_is_told(user: User, files: Any, splits: Any, message: str) -> None:
    user.hub.add("dataset", DATASET, files)
    assert user.refused("dataset", **splits).startswith(message)
    assert not user.file("data/raw").exists()


# In the pipeline.


def test_dvc_fetches_once_and_preprocess_reads_what_came(user: User) -> None:
    commit = user.hub.add("dataset", DATASET, {"train.parquet": parquet(ROWS), "test.parquet": parquet(ROWS[:3])}).refs[
        "main"
    ]
    user.choose("dataset", revision=commit, train_split="train", prompt="question", completion="answer")
    user.checkout.run("dvc", "repro", "--quiet", "fetch@dataset")
    rows = user.checkout.run("python", "-c", READ_RAW).stdout
    assert rows == "40 0 + 0?\n"
    # One file in three places: the hub's cache, DVC's cache, data/raw.
    raw = user.file("data/raw/train.parquet")
    assert raw.samefile(next(user.cache.rglob("snapshots/*/train.parquet")))
    assert raw.stat().st_nlink == 3
    assert raw.stat().st_mode & 0o777 == 0o444

    user.hub.requests.clear()
    user.checkout.run("dvc", "repro", "--quiet", "fetch@dataset")
    assert not user.hub.requests
    raw.unlink()
    user.checkout.run("dvc", "checkout", "--quiet", "fetch@dataset")
    assert raw.read_bytes() == parquet(ROWS)


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_a_model_and_a_dataset_of_the_hub(user: User, small_model: Path) -> None:
    user.hub.add("model", MODEL, {file.name: file.read_bytes() for file in small_model.iterdir()})
    rows = [{"ask": f"say {i} in the {room}", "reply": f"{room} {i}"} for i in range(30) for room in ("hall", "attic")]
    user.hub.add("dataset", DATASET, {"data/train-00000-of-00001.parquet": parquet(rows)})
    user.checkout.set(SMALL)
    user.choose("dataset", train_split="train", prompt="ask", completion="reply")
    user.choose("model")
    user.checkout.run("dvc", "repro", "--quiet")
    measured = user.checkout.json("metrics/evaluate/test.json")
    assert list(measured) == artifacts.list_artifacts(["Q8_0", "Q4_K_M"])
    shipped = describe_gguf(user.checkout.root / "models/gguf/Q4_K_M.gguf")["metadata"]
    for name, fetched in (("base", "model"), ("dataset", "dataset")):
        [origin] = user.checkout.json(f"metrics/fetch/{fetched}.json")["origin"]
        assert shipped[f"lathe.{name}.id"] == origin["id"]
        assert shipped[f"lathe.{name}.commit"] == origin["commit"]
    user.hub.requests.clear()
    user.checkout.run("dvc", "repro", "--quiet")
    assert not user.hub.requests


# As long as it takes to see that every value is taken; the rest is the recipe's.
SHORT = [
    *("training.max_steps=2", "training.logging_steps=1", "training.eval_steps=2", "training.save_steps=2"),
    *("grpo.max_steps=1", "grpo.max_completion_length=8", "quantize.imatrix_rows=4"),
    *("generate.max_rows=2", "generate.max_new_tokens=32", "generate.few_shot=1"),
]
NEEDS_A_GPU = {"vikhr-8b": ["training.precision=auto", "quantization.bnb_4bit_compute_dtype=auto"]}


def prose(number: int) -> str:
    """Words that are in no other row."""
    return " ".join(f"{word}{number}" for word in ("Each", "of", "them", "counts", "what", "the", "others", "have"))


def files_of(dataset: str) -> dict[str, bytes]:
    """What the data set's repository holds, in the columns and under the names that its preset is made for."""
    match dataset:
        case "gsm8k":
            rows = [{"question": prose(i), "answer": f"It is {i}.\n#### {i}"} for i in range(60)]
            return configuration("main", {"train": rows[::2], "test": rows[1::2]})
        case "arxiv-summarization":
            rows = [{"article": prose(i) * 9, "abstract": prose(i)} for i in range(60)]
            return configuration("document", {"train": rows[::3], "validation": rows[1::3], "test": rows[2::3]})
        case "dolly-15k":
            columns = {"context": "", "category": "open_qa"}
            rows = [{"instruction": prose(i), "response": f"{i}", **columns} for i in range(90)]
            return {"databricks-dolly-15k.jsonl": jsonl(rows)}
    rows = [{"instruction": prose(i), "input": "", "output": f"Ответ {i}"} for i in range(90)]
    return {"data/train-00000-of-00001.parquet": parquet(rows)}


def configuration(name: str, splits: dict[str, list[dict[str, Any]]]) -> dict[str, bytes]:
    """Files of one configuration, and the card that names them."""
    files = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
    card = {"configs": [{"config_name": name, "data_files": files}]}
    parts = {f"{name}/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}
    return {"README.md": f"---\n{json.dumps(card)}\n---\n# Rows\n".encode(), **parts}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "make"),
    [
        ("qwen3-600m", make_qwen3),
        ("gsm8k-grpo", make_qwen3),
        ("laptop", make_llama3),
        ("vikhr-8b", make_llama3),
        ("arxiv-ministral-3b", make_llama3),
    ],
)
def test_a_recipe_for_a_real_model_runs_whole_on_a_small_random_one_in_its_place(
    user: User, tmp_path: Path, recipe: str, make: Callable[[Path], None]
) -> None:
    overrides = recipes.load_recipe(recipe).recipe.overrides
    presets = YAML(typ="safe").load(user.file("presets.yaml"))
    make(tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    user.hub.add("model", presets["models"][overrides["model"]]["id"], files)
    user.hub.add("dataset", presets["datasets"][overrides["dataset"]]["id"], files_of(overrides["dataset"]))
    further = [word for each in [*SHORT, *NEEDS_A_GPU.get(recipe, [])] for word in ("-S", each)]
    user.environment["PYTHONPATH"] = str(user.file("src"))
    user.checkout.run(sys.executable, "-m", "lathe", "run", recipe, *further)
    measured = user.checkout.json("metrics/evaluate/validation.json")
    assert list(measured) == artifacts.list_artifacts(overrides["quantize.types"])
    assert set(overrides["evaluate.metrics"]) < set(measured["merged"])
    assert len(user.checkout.json("metrics/evaluate/gates.json")["gates"]) == len(overrides["evaluate.gates"])
    listed = user.checkout.run(sys.executable, "-m", "lathe", "experiments").stdout
    assert re.search(rf"{recipe} \(\w{{10}}\): {overrides['evaluate.primary_metric']} ", listed)


READ_RAW = """
import sys; sys.path.insert(0, "src")
from lathe.common import paths
from lathe.data.split_files import find_split_files
from lathe.data.read_files import read_records
rows = [row for file in find_split_files(paths.DATA_RAW)["train"] for row in read_records(file)]
print(len(rows), rows[0].value["question"])
"""
