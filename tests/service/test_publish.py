"""Publishing to a hub on 127.0.0.1 by the real client, and releases verified by their signed statement."""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Checkout, copy_of
from hub_server import WRITING_TOKEN, Fault, Hub
from huggingface_hub import constants
from refusals import refused

from lathe.provenance.signed_statement import STATEMENT_FILE, make_key, sign_statement, verify_statement
from lathe.publishing.licences import find_licences

REPOSITORY = "me/small-GGUF"
LAID_OUT = ".scratch/publish/me--small-GGUF"


@pytest.fixture(scope="module")
def made(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose pipeline has run; each test leaves its outputs as they were."""
    checkout = copy_of(reproduced, tmp_path_factory.mktemp("publish") / "lathe")
    set_gates(checkout, passed=True)  # which a model of this size does not
    return checkout


def set_gates(checkout: Checkout, *, passed: bool) -> None:
    (checkout.root / "metrics/evaluate/gates.json").write_text(json.dumps([{"passed": passed, "gates": {}}]))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def run_lathe(made: Checkout, hub: Hub, *arguments: str | Path, token: str | None, check: bool) -> Any:
    environment = {
        "PYTHONPATH": str(made.root / "src"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token or "",
    }
    done = made.run("python", "-m", "lathe", *map(str, arguments), check=check, env=environment)
    assert "Traceback" not in done.stderr
    assert WRITING_TOKEN not in done.stdout + done.stderr
    return done


@pytest.fixture
def lathe(made: Checkout, hub: Hub) -> Any:
    """Run a command of `lathe` with the token of an account that may write; `token=None` for none."""

    def run(*arguments: str | Path, token: str | None = WRITING_TOKEN, check: bool = True) -> Any:
        return run_lathe(made, hub, *arguments, token=token, check=check)

    return run


@pytest.fixture(scope="module")
def key(made: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "lathe.key"
    made.run("python", "-m", "lathe", "sign-key", str(file), env={"PYTHONPATH": str(made.root / "src")})
    assert file.stat().st_mode & 0o777 == 0o600
    return file


def files_of(hub: Hub, name: str = REPOSITORY) -> dict[str, bytes]:
    repository = hub.repositories["model", name]
    return repository.commits[repository.refs["main"]]


def read_front_matter(card: bytes) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(card.decode().split("---\n", 2)[1])
    return front


def test_without_yes_nothing_is_sent_and_the_release_lies_in_a_folder(made, lathe, hub):
    done = lathe("publish", REPOSITORY, token=None)
    assert hub.asked("POST|PUT") == []
    assert f"{REPOSITORY} (private), laid out in {LAID_OUT}" in done.stdout
    assert "nothing was uploaded; the same with --yes uploads it" in done.stdout
    assert "small-Q4_K_M.gguf" in done.stdout
    types = yaml.safe_load((made.root / "params.yaml").read_text())["quantize"]["types"]
    laid_out = {str(file.relative_to(made.root / LAID_OUT)) for file in (made.root / LAID_OUT).rglob("*.gguf")}
    assert laid_out == {f"small-{name}.gguf" for name in types}


def test_uploaded_bytes_are_those_of_the_pipeline_and_the_repository_is_private(made, lathe, hub, key):
    done = lathe("publish", REPOSITORY, "--files", "Q4_K_M", "merged", "adapter", "--sign", key, "--yes")
    assert "uploaded and compared: " in done.stdout
    assert hub.repositories["model", REPOSITORY].private
    files = files_of(hub)
    assert files["small-Q4_K_M.gguf"] == (made.root / "models/gguf/Q4_K_M.gguf").read_bytes()
    assert files["small-F16.gguf"] == (made.root / "models/gguf/merged-f16.gguf").read_bytes()
    weights = "adapter_model.safetensors"
    assert files[f"adapter/{weights}"] == (made.root / "models/adapter" / weights).read_bytes()
    for name in made.root.joinpath(LAID_OUT).rglob("*"):
        if name.is_file():
            assert files[str(name.relative_to(made.root / LAID_OUT))] == name.read_bytes()
    config = json.loads(files["adapter/adapter_config.json"])
    assert str(made.root) not in json.dumps(config)
    assert not config["base_model_name_or_path"].startswith("models/")
    # Large files are sent to the store that the hub names, and the token is not.
    sent = hub.asked("^PUT")
    assert len(sent) >= 3
    assert all(request.server == "cdn" and "authorization" not in request.headers for request in sent)

    # The same again sends no large file twice.
    lathe("publish", REPOSITORY, "--files", "Q4_K_M", "merged", "adapter", "--sign", key, "--yes")
    assert len(hub.asked("^PUT")) == len(sent)
    assert files_of(hub) == files


def test_the_card_has_the_hubs_metadata_and_results_and_names_the_files_as_they_are_there(made, lathe, hub):
    lathe("publish", REPOSITORY, "--files", "Q4_K_M", "--yes")
    card = files_of(hub)["README.md"]
    front = read_front_matter(card)
    [entry] = front["model-index"]
    assert entry["name"] == "small-GGUF"
    [report] = json.loads((made.root / "metrics/evaluate/test.json").read_text())
    results = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert results["exact_match"] == report["Q4_K_M"]["exact_match"]
    assert results["kl"] == report["Q4_K_M"]["kl"]
    assert front["pipeline_tag"] == "text-generation"
    text = card.decode()
    assert f"ollama run hf.co/{REPOSITORY}:Q4_K_M" in text
    assert f"llama-cli -hf {REPOSITORY}:Q4_K_M" in text
    assert "`small-Q4_K_M.gguf`" in text
    assert "## Licences" in text
    assert "no licence is known" in text
    assert str(made.root) not in text
    assert b"FROM ./small-Q4_K_M.gguf" in files_of(hub)["Modelfile"]
    options = json.loads(files_of(hub)["params"])
    assert options["temperature"] == 0
    assert options["stop"]


@pytest.fixture
def asked_of(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, for the client in this process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


def test_licences_of_base_and_data_are_found_and_a_non_commercial_one_is_said(asked_of, caplog):
    model = {"name": "small", "id": "them/small"}
    for name, licence in {"them/free": "mit", "them/nc": "cc-by-nc-4.0"}.items():
        commit = asked_of.add("dataset", name, {"data.jsonl": b"{}"})
        commit.card = {"license": licence}
    parts = [{"name": name, "id": f"them/{name}", "source": "hub"} for name in ("free", "nc", "gone")]
    mixture = {"name": "mixed", "source": "mixture", "datasets": [*parts, {"name": "mine", "source": "local"}]}
    base, free, forbidding, gone, mine = find_licences(model, mixture, {"license": "apache-2.0"})
    assert (base.describe(), free.describe()) == ("base them/small: apache-2.0", "data them/free: mit")
    assert "data them/nc: cc-by-nc-4.0; NON-COMMERCIAL" in forbidding.describe()
    assert gone.licence == mine.licence == "not known"
    assert "them/gone: the hub cannot be asked for its licence" in caplog.text


def test_an_adapter_alone_has_no_gguf_and_its_relation(made, lathe, hub):
    lathe("publish", "me/small-lora", "--files", "adapter", "--yes", "--public")
    files = files_of(hub, "me/small-lora")
    assert not hub.repositories["model", "me/small-lora"].private
    assert not [name for name in files if name.endswith(".gguf")]
    assert read_front_matter(files["README.md"])["library_name"] == "peft"


def test_a_public_repository_is_not_written_to_unless_that_is_said(lathe, hub):
    hub.add("model", REPOSITORY, {"README.md": b"there"})
    done = lathe("publish", REPOSITORY, "--files", "Q4_K_M", "--yes", check=False)
    assert done.returncode == 2
    assert "exists and is public; give --public" in done.stderr
    assert files_of(hub) == {"README.md": b"there"}
    lathe("publish", REPOSITORY, "--files", "Q4_K_M", "--yes", "--public")
    assert "small-Q4_K_M.gguf" in files_of(hub)


@pytest.mark.parametrize(
    ("arguments", "token", "told"),
    [
        ((REPOSITORY, "--yes"), None, "HF_TOKEN: is not set"),
        ((REPOSITORY, "--yes"), "hf_wrong_and_secret", "401"),
        ((REPOSITORY, "--yes"), "hf_this_token_may_read_everything", "403"),
        (("small", "--yes"), WRITING_TOKEN, "OWNER/NAME"),
        (("me/a b", "--yes"), WRITING_TOKEN, "me/a b"),
        ((REPOSITORY, "--files", "Q4_K_N"), WRITING_TOKEN, "did you mean 'Q4_K_M'?"),
        ((REPOSITORY, "--sign", "no.key"), WRITING_TOKEN, "lathe sign-key"),
    ],
)
def test_what_cannot_be_published_is_one_line_without_the_token(lathe, hub, arguments, token, told):
    done = lathe("publish", *arguments, token=token, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert "hf_wrong_and_secret" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert hub.repositories == {}


def test_a_file_that_is_not_the_measured_one_is_refused(made, lathe, hub):
    file = made.root / "models/gguf/Q4_K_M.gguf"
    before = file.read_bytes()
    file.unlink()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        done = lathe("publish", REPOSITORY, "--files", "Q4_K_M", "--yes", check=False)
    finally:
        file.write_bytes(before)
    assert done.returncode == 2
    assert "models/gguf/Q4_K_M.gguf: differs from dvc.lock" in done.stderr
    assert hub.asked("POST") == []


def test_a_model_that_fails_a_gate_is_not_uploaded_unless_that_is_said(made, lathe, hub):
    set_gates(made, passed=False)
    try:
        done = lathe("publish", REPOSITORY, "--files", "Q4_K_M", "--yes", check=False)
        assert done.returncode == 2
        assert "a gate fails" in done.stderr
        assert hub.asked("POST") == []
        lathe("publish", REPOSITORY, "--files", "Q4_K_M", "--yes", "--despite-gates")
        assert "small-Q4_K_M.gguf" in files_of(hub)
    finally:
        set_gates(made, passed=True)


def test_an_upload_that_broke_off_is_told_and_goes_on(lathe, hub):
    hub.faults = [Fault("^PUT ", status=400, times=1)]
    done = lathe("publish", REPOSITORY, "--files", "Q4_K_M", "Q8_0", "--yes", check=False)
    assert done.returncode == 2
    assert "run it again" in done.stderr
    assert "small-Q4_K_M.gguf" not in files_of(hub)
    lathe("publish", REPOSITORY, "--files", "Q4_K_M", "Q8_0", "--yes")
    assert {"small-Q4_K_M.gguf", "small-Q8_0.gguf"} <= set(files_of(hub))


def test_what_the_hub_lost_on_the_way_is_found(lathe, hub):
    lathe("publish", REPOSITORY, "--files", "Q4_K_M", "--yes")
    hub.repositories["model", REPOSITORY].announced_hashes["params"] = "0" * 40
    done = lathe("publish", REPOSITORY, "--files", "Q4_K_M", "--yes", check=False)
    assert done.returncode == 2
    assert "params has another hash there" in done.stderr


@pytest.fixture(scope="module")
def released(made: Checkout, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed release as somebody else has downloaded it; to be copied."""
    folder = tmp_path_factory.mktemp("released") / "release"
    with Hub() as hub:
        arguments = ("publish", REPOSITORY, "--files", "Q4_K_M", "adapter", "--sign", key, "--yes")
        run_lathe(made, hub, *arguments, token=WRITING_TOKEN, check=True)
        for name, content in files_of(hub).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def downloaded(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "release"))


def test_a_signed_release_verifies_with_the_public_key_and_tells_its_origin(lathe, downloaded, key):
    done = lathe("verify", downloaded, "--key", f"{key}.pub")
    assert "nothing differs" in done.stdout
    assert "base: not on the Hub, digest " in done.stdout
    assert "commit: " in done.stdout
    one = verify_statement(downloaded / "small-Q4_K_M.gguf", Path(f"{key}.pub"))
    assert (one.files, one.problems) == (1, [])
    assert "belong together" in lathe("verify", downloaded, check=False).stderr
    tamper_with_weights(downloaded)
    done = lathe("verify", downloaded, "--key", f"{key}.pub", check=False)
    assert done.returncode == 1
    assert "1 problems" in done.stdout


def tamper_with_weights(folder: Path) -> None:
    with (folder / "small-Q4_K_M.gguf").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))


def tamper_with_statement(folder: Path) -> None:
    """Name the changed file's own hash in the statement: only the signature tells."""
    tamper_with_weights(folder)
    file = folder / STATEMENT_FILE
    envelope = json.loads(file.read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    for subject in statement["subject"]:
        if subject["name"] == "small-Q4_K_M.gguf":
            subject["digest"]["sha256"] = hashlib.sha256((folder / subject["name"]).read_bytes()).hexdigest()
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    file.write_text(json.dumps(envelope))


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (tamper_with_weights, "small-Q4_K_M.gguf: changed (SHA-256 "),
        (lambda folder: (folder / "more.bin").write_bytes(b"x"), "more.bin: the statement does not name it"),
        (lambda folder: (folder / "README.md").unlink(), "README.md: missing"),
    ],
)
def test_a_file_that_was_changed_added_or_removed_is_named(downloaded, key, tamper, told):
    tamper(downloaded)
    [problem] = verify_statement(downloaded, Path(f"{key}.pub")).problems
    assert problem.startswith(told)


@pytest.mark.parametrize(
    ("tamper", "code", "told"),
    [
        (tamper_with_statement, "wrong-signature", "has not signed this statement, or it was changed"),
        (lambda folder: (folder / STATEMENT_FILE).unlink(), "not-signed", "nothing is signed here"),
        (lambda folder: (folder / STATEMENT_FILE).write_text("{}"), "invalid-statement", "is no signed statement"),
        (shutil.rmtree, "no-such-file", "no such file or folder"),
    ],
)
def test_a_statement_that_was_changed_or_removed_verifies_nothing(downloaded, key, tamper, code, told):
    tamper(downloaded)
    with refused(code, told, kept=False):
        verify_statement(downloaded, Path(f"{key}.pub"))


def test_another_key_verifies_nothing_and_a_key_is_not_written_over(downloaded, key, tmp_path, monkeypatch):
    other = make_key(tmp_path / "other.key")
    with refused("wrong-signature", "other.key.pub", kept=False):
        verify_statement(downloaded, other)
    with refused("invalid-key-file", "is no public key", kept=False):
        verify_statement(downloaded, key)
    with refused("file-exists", "a key is not written over", kept=False):
        make_key(key)
    monkeypatch.setenv("LATHE_SIGNING_PASSWORD", "secret")
    make_key(tmp_path / "encrypted.key")
    assert sign_statement({}, tmp_path / "encrypted.key")
    with refused("key-password", "is not encrypted", kept=False):
        sign_statement({}, key)
    monkeypatch.delenv("LATHE_SIGNING_PASSWORD")
    with refused("key-password", "is encrypted; set LATHE_SIGNING_PASSWORD", kept=False):
        sign_statement({}, tmp_path / "encrypted.key")


def test_the_statement_is_one_that_other_tools_read_and_the_same_for_the_same_files(released, key):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    envelope = json.loads((released / STATEMENT_FILE).read_text())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    # DSSE's encoding and Ed25519, by the library that has the primitive alone.
    public = load_pem_public_key(Path(f"{key}.pub").read_bytes())
    assert isinstance(public, Ed25519PublicKey)
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)
    statement = json.loads(payload)
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    digests = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert digests["small-Q4_K_M.gguf"] == hashlib.sha256((released / "small-Q4_K_M.gguf").read_bytes()).hexdigest()
    assert sign_statement(statement, key) == (released / STATEMENT_FILE).read_text()
