import pytest

from lathe import paths, sources
from lathe.errors import InputError
from lathe.params import LocalDataset, LocalModel


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
    sources.fetch_model(LocalModel(source="local", path="models/local/mine"), home / "out", seed=1)


def test_a_local_file_is_copied_unchanged_and_stays_the_users_own(home):
    (home / "data/local/rows.csv").write_text("a,b\n1,2\n")
    sources.fetch_dataset(LocalDataset(source="local", path="data/local/rows.csv"), home / "out", seed=1)
    assert (home / "out/rows.csv").read_text() == "a,b\n1,2\n"
    assert not (home / "out/rows.csv").samefile(home / "data/local/rows.csv")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", "path '/etc/passwd' is not under data/local/, which is what DVC watches"),
        ("data/local/../../x.csv", "is not under data/local/"),
        ("data/local/none.csv", "data/local/none.csv: no such file or folder; put it there and run `dvc add"),
        ("data/local/empty", "data/local/empty: holds no data file; expected one of *.jsonl, *.json, *.csv, *.parquet"),
    ],
)
def test_a_local_path_that_cannot_be_fetched_is_refused(home, path, message):
    (home / "data/local/empty").mkdir()
    with pytest.raises(InputError) as caught:
        sources.fetch_dataset(LocalDataset(source="local", path=path), home / "out", seed=1)
    assert message in str(caught.value)


def test_a_local_model_is_linked_not_copied_and_brings_no_code_or_pickles(home):
    folder = home / "models/local/mine"
    for name in ("config.json", "tokenizer_config.json", "model.safetensors", "modeling_mine.py", "extra.bin"):
        (folder / name).write_text("{}")
    fetch_model(home)
    assert sorted(file.name for file in (home / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert (home / "out/model.safetensors").samefile(folder / "model.safetensors")


def test_a_model_folder_with_pickles_alone_is_refused(home):
    folder = home / "models/local/mine"
    for name in ("config.json", "tokenizer_config.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: pickled weights are never loaded"):
        fetch_model(home)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no config.json"),
        (["config.json"], "holds no tokenizer_config.json"),
        (["config.json", "tokenizer_config.json"], r"holds no \*.safetensors"),
    ],
)
def test_an_incomplete_model_folder_is_refused(home, files, message):
    for name in files:
        (home / "models/local/mine" / name).write_text("{}")
    with pytest.raises(InputError, match=message):
        fetch_model(home)
