"""The encoder of BERTScore from a hub on 127.0.0.1, by the real client."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Checkout, make_checkout
from encoders import make_encoder
from hub_server import Hub
from ruamel.yaml import YAML

NAME = "owner/encoder"
PROGRAM = """
from pathlib import Path
from lathe.evaluation.bert_score import Encoder, compute_scores

encoder = Encoder(Path("models/encoder"), num_layers=None, max_length=32)
print(compute_scores([("a b", "b a")], encoder, batch_size=1, cache=Path("cache")))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("hub_encoder") / "lathe")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_encoder(tmp_path_factory.mktemp("encoder"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fetched(
    checkout: Checkout, hub: Hub, home: Path, name: str = NAME, revision: str | None = None
) -> subprocess.CompletedProcess[str]:
    metrics = ["exact_match", "bert_score"]
    presets = checkout.root / "presets.yaml"
    tree = YAML().load(presets)
    tree["encoders"]["chosen"] = {"source": "hub", "id": name, **({"revision": revision} if revision else {})}
    YAML().dump(tree, presets)
    checkout.set({"bert_score.model": "chosen", "evaluate.metrics": metrics})
    kept = {key: value for key, value in checkout.environment.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "stages/fetch.py", "encoder"],
        cwd=checkout.root,
        env={**kept, "HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_encoder_is_downloaded_once_without_pickles_or_code(
    checkout: Checkout, hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    unwanted = {"pytorch_model.bin": b"pickled", "modeling_mine.py": b"raise SystemExit('run')"}
    commit = hub.add("model", NAME, files | unwanted).refs["main"]
    first = fetched(checkout, hub, tmp_path, revision=commit)
    assert first.returncode == 0, first.stderr
    assert not hub.asked(r"resolve/.*(bin|py)$")
    assert {file.name for file in (checkout.root / "models/encoder").iterdir()} == set(files)
    [origin] = checkout.json("metrics/fetch/encoder.json")["origin"]
    assert (origin["name"], origin["source"], origin["id"], origin["commit"]) == ("chosen", "hub", NAME, commit)
    assert origin["files"] == len(files)
    assert origin["bytes"] == sum(map(len, files.values()))
    hub.requests.clear()
    again = fetched(checkout, hub, tmp_path, revision=commit)
    assert again.returncode == 0, again.stderr
    assert checkout.json("metrics/fetch/encoder.json") == {"origin": [origin]}
    assert not hub.requests
    scored = checkout.run("python3", "-c", PROGRAM, env={"PYTHONPATH": "src"})
    assert re.fullmatch(r"\{\('a b', 'b a'\): 0\.\d+\}\n", scored.stdout), scored.stdout


def test_without_bert_score_nothing_is_fetched(checkout: Checkout) -> None:
    checkout.set({"bert_score.model": "minilm", "evaluate.metrics": ["exact_match"]})
    checkout.stage("fetch", "encoder")
    assert [file.name for file in (checkout.root / "models/encoder").iterdir()] == ["unused.txt"]
    assert checkout.json("metrics/fetch/encoder.json") == {"origin": None}


def test_a_branch_is_resolved_and_the_line_that_pins_it_is_printed(
    checkout: Checkout, hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    commit = hub.add("model", NAME, files).refs["main"]
    done = fetched(checkout, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"put into its entry in presets.yaml\n    revision: {commit}\n" in done.stderr


def test_an_encoder_that_is_not_there_is_refused_by_the_key_that_names_it(
    checkout: Checkout, hub: Hub, tmp_path: Path
) -> None:
    done = fetched(checkout, hub, tmp_path, name="owner/none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: owner/none: no such model on ")
    assert "check `id` in presets.yaml" in done.stderr


def test_an_encoder_with_pickles_alone_is_refused(
    checkout: Checkout, hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    pickled = {name: data for name, data in files.items() if name != "model.safetensors"}
    hub.add("model", NAME, pickled | {"pytorch_model.bin": b"pickled"})
    done = fetched(checkout, hub, tmp_path)
    assert done.returncode == 2
    assert "pytorch_model.bin: pickled weights are never loaded" in done.stderr
