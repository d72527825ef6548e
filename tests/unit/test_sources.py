import json
import shutil

import numpy
import pytest
from encoders import make_encoder
from refusals import refused
from safetensors.numpy import save_file

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.presets import LocalDataset, LocalEncoder, LocalModel
from lathe.sources import fetch


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "DATA_LOCAL", tmp_path / "data/local")
    monkeypatch.setattr(paths, "MODELS_LOCAL", tmp_path / "models/local")
    (tmp_path / "data/local").mkdir(parents=True)
    (tmp_path / "models/local/mine").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    return tmp_path


def fetch_model(home):
    fetch.fetch_model(LocalModel(source="local", path="models/local/mine"), home / "out", seed=1)


def write_model(folder, shards=("model.safetensors",)):
    """The least that is taken for a model: two tensors per file."""
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    weight_map = {}
    for shard in shards:
        tensors = {f"{shard}.{name}": numpy.zeros((4, 4), numpy.float16) for name in "ab"}
        save_file(tensors, folder / shard)
        weight_map.update(dict.fromkeys(tensors, shard))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_local_file_is_copied_unchanged_and_stays_the_users_own(home):
    (home / "data/local/rows.csv").write_text("a,b\n1,2\n")
    fetch.fetch_dataset(LocalDataset(source="local", path="data/local/rows.csv"), home / "out", seed=1)
    assert (home / "out/rows.csv").read_text() == "a,b\n1,2\n"
    assert not (home / "out/rows.csv").samefile(home / "data/local/rows.csv")


@pytest.mark.parametrize(
    ("path", "code", "part"),
    [
        ("/etc/passwd", "outside-local", "path '/etc/passwd' is not under data/local/"),
        ("data/local/../../x.csv", "outside-local", "is not under data/local/"),
        ("data/local/none.csv", "no-such-file", "data/local/none.csv: no such file or folder; put it there"),
        ("data/local/empty", "no-data-files", "data/local/empty: holds no data file; expected one of *.jsonl, *.json"),
    ],
)
def test_a_local_path_that_cannot_be_fetched_is_refused(home, path, code, part):
    (home / "data/local/empty").mkdir()
    with refused(code, part):
        fetch.fetch_dataset(LocalDataset(source="local", path=path), home / "out", seed=1)


def test_a_local_model_is_linked_not_copied_and_brings_no_code_or_pickles(home):
    folder = home / "models/local/mine"
    write_model(folder)
    for name in ("modeling_mine.py", "extra.bin"):
        (folder / name).write_text("{}")
    fetch_model(home)
    assert not (home / "out/config.json").samefile(folder / "config.json")  # DVC would make the user's read-only
    assert sorted(file.name for file in (home / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert (home / "out/model.safetensors").samefile(folder / "model.safetensors")


def test_a_model_of_linked_files_brings_what_they_point_to(home):
    elsewhere, folder = home / "elsewhere", home / "models/local/mine"
    elsewhere.mkdir()
    write_model(elsewhere)
    for file in elsewhere.iterdir():
        (folder / file.name).symlink_to(file)
    fetch_model(home)
    for file in elsewhere.iterdir():
        assert not (home / "out" / file.name).is_symlink()
        assert (home / "out" / file.name).read_bytes() == file.read_bytes()
    assert (home / "out/model.safetensors").samefile(elsewhere / "model.safetensors")


@pytest.mark.parametrize("inside", ["", "deeper/"])
def test_a_linked_folder_is_refused_because_dvc_sees_no_change_behind_it(home, inside):
    elsewhere = home / "elsewhere"
    (elsewhere / "deeper").mkdir(parents=True)
    (home / "data/local/linked").symlink_to(elsewhere)
    preset = LocalDataset(source="local", path=f"data/local/linked/{inside}")
    with refused("linked-folder", "data/local/linked: is a link to a folder", f"cp -rs {elsewhere} data/local"):
        fetch.fetch_dataset(preset, home / "out", seed=1)


def test_a_model_folder_with_pickles_alone_is_refused(home):
    folder = home / "models/local/mine"
    for name in ("config.json", "tokenizer_config.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    with refused("pickled-weights", "pytorch_model.bin: "):
        fetch_model(home)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no config.json"),
        (["config.json"], "holds no tokenizer_config.json"),
        (
            ["config.json", "tokenizer_config.json"],
            "holds no *.safetensors",
        ),
    ],
)
def test_an_incomplete_model_folder_is_refused(home, files, message):
    for name in files:
        (home / "models/local/mine" / name).write_text("{}")
    with refused("incomplete-model", message):
        fetch_model(home)


SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("shards", "harm", "message"),
    [
        (1, lambda folder: cut(folder / "model.safetensors"), "model.safetensors: not a whole safetensors file"),
        (1, lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors: not a whole"),
        (3, lambda folder: cut(folder / SHARDS[1]), f"{SHARDS[1]}: not a whole safetensors file"),
        (
            3,
            lambda folder: (folder / SHARDS[2]).unlink(),
            f"holds no {SHARDS[2]}, which model.safetensors.index.json names",
        ),
        (1, lambda folder: (folder / "config.json").write_text('{"a": '), "config.json:1: not valid JSON"),
        (1, lambda folder: (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}'), "is set, a"),
    ],
)
def test_a_harmed_or_quantized_model_folder_is_refused_before_anything_is_trained(home, shards, harm, message):
    write_model(home / "models/local/mine", SHARDS if shards == 3 else ("model.safetensors",))
    fetch_model(home)
    harm(home / "models/local/mine")
    with pytest.raises(InputError) as caught:
        fetch_model(home)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def fetch_encoder(home, model="models/local/encoder"):
    folder = home / "fetched"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return fetch.fetch_encoder(LocalEncoder(source="local", path=model), folder)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_in_a_model_folder_is_named_for_what_it_is(home, name):
    folder = home / "models/local/mine"
    write_model(folder)
    (folder / name).write_text(POINTER)
    with refused("lfs-pointer", f"models/local/mine/{name}: is a pointer of Git LFS", "git lfs pull"):
        fetch_model(home)


def test_a_pointer_of_git_lfs_as_a_dataset_or_a_gguf_file_is_named_for_what_it_is(home):
    (home / "data/local/rows").mkdir()
    (home / "data/local/rows/train.jsonl").write_text(POINTER)
    with refused("lfs-pointer", "data/local/rows: train.jsonl: is a pointer of Git LFS"):
        fetch.fetch_dataset(LocalDataset(source="local", path="data/local/rows"), home / "out", seed=1)
    (home / "models/local/mine.gguf").write_text(POINTER)
    with refused("lfs-pointer", "models/local/mine.gguf: is a pointer of Git LFS"):
        fetch.fetch_model(LocalModel(source="local", path="models/local/mine.gguf"), home / "out", seed=1)


def test_an_encoder_is_a_complete_folder_under_models_local(home, encoder):
    source = home / "models/local/encoder"
    shutil.copytree(encoder, source)
    (source / "modeling_mine.py").write_text("raise SystemExit")
    assert fetch_encoder(home) == {}
    assert {file.name for file in (home / "fetched").iterdir()} == {file.name for file in encoder.iterdir()}
    for missing, code, said in (
        ("models/local/none", "no-such-file", "models/local/none: no such file or folder; put it there"),
        ("models/local/../encoder", "outside-local", "is not under models/local/"),
        ("models/local/", "outside-local", "is not under models/local/"),
        ("models/local/encoder/config.json", "not-a-folder", "is a file; give the folder"),
    ):
        with refused(code, said):
            fetch_encoder(home, missing)
    (source / "model.safetensors").write_bytes((encoder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
        fetch_encoder(home)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with refused("pickled-weights", "pytorch_model.bin: "):
        fetch_encoder(home)
