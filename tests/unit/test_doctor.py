"""What the doctor finds in circumstances that are really broken, and that it finds nothing where nothing is."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusals import refused
from toy import PYTHONPATH, load_toy

from lathe.common import paths
from lathe.doctor import checks, device, doctor
from lathe.doctor.checks import Circumstances, Finding
from lathe.needs.disk_space import find_working_links

CONFIG = load_toy()
GB = 10**9
QWEN = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def circumstances(
    root: Path = paths.ROOT, *, disk: int = 1000 * GB, memory: int = 1000 * GB, **environment: str
) -> Any:
    return Circumstances(root, environment, free_disk=lambda folder: disk, free_memory=lambda: memory)


def shown(findings: Any) -> str:
    return "".join(doctor.format_findings(list(findings), coloured=False))


def git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=A User", "-c", "user.email=user@example.invalid"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A Git repository with one commit and an empty DVC configuration."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "a state to start from")
    return tmp_path


def configured(repository: Path, text: str) -> Path:
    (repository / ".dvc/config").write_text(text)
    return repository


def with_params(**sections: dict[str, Any]) -> Any:
    """Return the configuration with some keys of some sections changed."""
    changed = {name: getattr(CONFIG.params, name).model_copy(update=keys) for name, keys in sections.items()}
    return CONFIG.model_copy(update={"params": CONFIG.params.model_copy(update=changed)})


def with_model(folder: Path) -> Any:
    """Return the configuration with the model in `folder` selected, at a size that real models are trained with."""
    config = with_params(training={"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4})
    return config.model_copy(update={"model": SimpleNamespace(source="local", path=str(folder))})


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """The folder of a model of which only config.json is there."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN))
    return folder


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 14), "fail"), ((3, 11, 0), "ok"), ((3, 12, 1), "ok"), ((3, 13, 0), "ok"), ((3, 14, 0), "fail")],
)
def test_only_a_python_that_the_packages_are_pinned_for_will_do(version, status):
    [finding] = checks.check_python(version)
    assert finding.status == status
    assert (finding.remedy == "") == (status == "ok")


@pytest.mark.parametrize(
    ("needed", "optional", "expected"),
    [
        ("", "", "ok       packages  0 of pyproject.toml, as pinned\n"),
        (
            "pytest==0.0.1",
            "",
            f"warning  packages  pytest {pytest.__version__} is installed; pyproject.toml pins 0.0.1; `make setup`\n",
        ),
        (
            "no-such-package==1.2; python_version > '3'",
            "",
            "fail     packages  no-such-package is not installed; pyproject.toml pins 1.2; `make setup`\n",
        ),
        (
            f"pytest[all]=={pytest.__version__}",
            "no-such-package==1",
            "ok       packages  1 of pyproject.toml, as pinned\n",
        ),
        (
            "",
            "pytest==0.0.1",
            f"warning  packages  pytest {pytest.__version__} is installed; pyproject.toml pins 0.0.1; `make setup`\n",
        ),
    ],
)
def test_packages_are_held_against_their_pins(tmp_path, needed, optional, expected):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        "[project]\n"
        f"dependencies = {[needed] if needed else []}\n"
        f"optional-dependencies = {{feature = {[optional] if optional else []}}}\n"
    )
    assert shown(checks.check_packages(file)) == expected


def test_a_repository_needs_a_commit_but_may_have_changes(tmp_path):
    [finding] = checks.check_repository(tmp_path)
    assert (finding.status, "is not in a Git repository" in finding.text) == ("fail", True)
    git(tmp_path, "init", "--quiet")
    [finding] = checks.check_repository(tmp_path)
    assert (finding.status, "no commit yet" in finding.text) == ("fail", True)
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "first")
    (tmp_path / "file").touch()
    [finding] = checks.check_repository(tmp_path)
    assert (finding.status, "1 changed files are not committed" in finding.text) == ("ok", True)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, []),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, []),
        ({"OMP_WAIT_POLICY": "active"}, ["OMP_WAIT_POLICY is ACTIVE"]),
        ({"OMP_NUM_THREADS": "999"}, ["OMP_NUM_THREADS is 999"]),
        ({"OMP_NUM_THREADS": "many", "OMP_WAIT_POLICY": "ACTIVE"}, ["OMP_WAIT_POLICY", "OMP_NUM_THREADS is many"]),
    ],
)
def test_threads_that_get_in_each_others_way_are_warned_of(environment, said):
    findings = list(device.check_threads(environment))
    assert [finding.status for finding in findings] == (["warning"] * len(said) or ["ok"])
    assert all(words in finding.text for words, finding in zip(said, findings, strict=False))


def test_a_converter_must_be_there_and_of_the_pinned_version(tmp_path):
    (tmp_path / "requirements-converter.txt").write_text((paths.ROOT / "requirements-converter.txt").read_text())
    [finding] = checks.check_converter(tmp_path, "llama.cpp")
    assert (finding.status, finding.text) == ("fail", "llama.cpp holds no convert_hf_to_gguf.py")
    assert "convert.llama_cpp_dir" in finding.remedy
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp/convert_hf_to_gguf.py").touch()
    [finding] = checks.check_converter(tmp_path, "llama.cpp")
    assert finding.status == "ok"
    [finding] = checks.check_converter(paths.ROOT, None)
    assert finding.status == "ok"


def test_a_converter_of_another_version_than_the_library_is_a_fail(tmp_path):
    text = (paths.ROOT / "requirements-converter.txt").read_text()
    (tmp_path / "requirements-converter.txt").write_text(text.replace("llama-cpp-python==", "llama-cpp-python==9."))
    with refused("other-llama-cpp", "converter and library must be of one", kept=False):
        list(checks.check_converter(tmp_path, None))


@pytest.mark.parametrize(
    ("cache", "status"),
    [
        ("", "warning"),  # DVC's own default begins with reflinks, and then copies
        ("[cache]\n    type = copy\n", "warning"),
        ('[cache]\n    type = "hardlink,symlink"\n', "ok"),
        ("[cache]\n    type = symlink\n", "ok"),
    ],
)
def test_copies_between_cache_and_checkout_are_warned_of(repository, cache, status):
    works = find_working_links(repository, repository / ".dvc/cache")
    [finding] = checks.check_links(configured(repository, cache))
    assert finding.status == ("ok" if not cache and "reflink" in works else status)
    assert not [path for path in repository.rglob("*") if path.suffix == ".tmp"]


def test_a_cache_on_another_file_system_has_no_hardlinks(repository):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == repository.stat().st_dev:
        pytest.skip("/dev/shm is no other file system here")
    cache = f"[cache]\n    type = hardlink\n    dir = {elsewhere}\n"
    [finding] = checks.check_links(configured(repository, cache))
    assert finding.status == "warning"
    findings = list(checks.check_disk(circumstances(repository), {"models/base": 3 * GB, "models/merged": 2 * GB}))
    # Symlinks work, so that what is needed in the checkout is room for one output on its way to the cache.
    assert [finding.details["total"] for finding in findings] == [3 * GB, 5 * GB]


REMOTE = """
[core]
    remote = far
['remote "far"']
    url = {url}
"""


@pytest.mark.parametrize(
    ("url", "status", "text"),
    [
        ("{tmp}/there", "ok", "there and writable"),
        ("{tmp}/empty", "ok", "`dvc pull` brings nothing"),
        ("{tmp}/next", "ok", "`dvc pull` brings nothing"),
        ("{tmp}/not/mounted", "warning", "neither it nor"),
        ("{tmp}/file/below", "fail", "is a file"),
        ("/proc/self/none", "fail", "cannot be written to"),
        ("s3://bucket/path", "warning", "no credentials"),
        ("gs://bucket/path", "ok", "not checked"),
        ("ssh://user:s3cr3t@host/path", "ok", "not checked"),
    ],
)
def test_remotes_are_looked_at_without_a_word_of_their_secrets(repository, url, status, text, monkeypatch):
    monkeypatch.setenv("HOME", str(repository))  # no ~/.aws of whoever runs this
    if "/proc" in url and os.access("/proc/self", os.W_OK):
        url, status, text = "/sys/none", "fail", "cannot be written to"
        if os.access("/sys", os.W_OK):
            pytest.skip("no folder here that cannot be written to")
    (repository / "there/files").mkdir(parents=True)
    (repository / "empty").mkdir()
    (repository / "file").touch()
    configured(repository, REMOTE.format(url=url.format(tmp=repository)))
    [finding] = checks.check_remotes(repository, {})
    assert (finding.status, text in finding.text) == (status, True), finding
    assert "s3cr3t" not in str(finding)


def test_a_repository_without_a_remote_is_warned_of(repository):
    [finding] = checks.check_remotes(repository, {})
    assert finding.status == "warning"


def test_an_s3_endpoint_that_does_not_answer_is_warned_of(repository):
    keys = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "s3cr3t"}
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        configured(repository, REMOTE.format(url=f"s3://bucket\n    endpointurl = {endpoint}"))
        [answered] = checks.check_remotes(repository, keys)
    [closed] = checks.check_remotes(repository, keys)
    assert (answered.status, closed.status) == ("ok", "warning")
    assert "does not answer" in closed.text
    assert "s3cr3t" not in str(closed)
    assert "an-id" not in str(closed)


@pytest.mark.parametrize(
    ("source", "token", "status"),
    [("builtin", "", "ok"), ("hub", "hf_s3cr3t", "ok"), ("hub", "", "warning")],
)
def test_a_token_is_asked_for_where_the_model_comes_from_a_hub(source, token, status):
    config = CONFIG.model_copy(update={"model": SimpleNamespace(source=source, id="an/id", revision=None)})
    [finding] = checks.check_credentials(config, {"HF_TOKEN": token})
    assert finding.status == status
    assert "s3cr3t" not in str(finding)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("memory", "status", "said"),
    [
        (1000 * GB, "ok", "weights 538 MB"),
        (20 * GB, "warning", "it may not fit; most of it is activations"),
        (8 * GB, "fail", "set training.gradient_checkpointing to true"),
    ],
)
def test_memory_is_held_against_the_estimate(qwen, memory, status, said):
    finding = next(iter(checks.check_model(with_model(qwen), circumstances(memory=memory))))
    assert (finding.check, finding.status) == ("memory", status)
    assert said in shown([finding])
    assert finding.details["available"] == memory


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_memory_of_a_method_that_is_not_estimated_is_a_warning(qwen, repository, method):
    model = with_model(qwen).model
    config = with_params(training={"method": method}).model_copy(update={"model": model})
    memory, disk = checks.check_model(config, circumstances(repository))
    assert (memory.check, memory.status, disk.check) == ("memory", "warning", "disk")
    assert memory.text == f"cannot be estimated: training.method is '{method}'; memory is estimated for 'sft' alone"


@pytest.mark.heavy
@pytest.mark.parametrize(("disk", "status"), [(100 * GB, "ok"), (7 * GB, "warning"), (2 * GB, "fail")])
def test_disk_is_held_against_every_output(qwen, repository, disk, status):
    configured(repository, '[cache]\n    type = "hardlink,symlink"\n')
    _, finding = checks.check_model(with_model(qwen), circumstances(repository, disk=disk))
    assert (finding.check, finding.status) == ("disk", status)
    outputs = {name: size for name, size in finding.details.items() if name not in ("total", "free")}
    assert set(outputs) >= {"models/adapter", "models/gguf/Q4_K_M.gguf"}
    assert finding.details["total"] == sum(filter(None, outputs.values()))


@pytest.mark.parametrize(
    ("content", "lora", "said"),
    [
        (None, {}, "config.json: no such file"),
        ("{", {}, "not valid JSON"),
        ('{"model_type": "qwen99"}', {}, "model_type is 'qwen99'; no architecture of the installed transformers"),
        (json.dumps(QWEN), {"target_modules": ["query"]}, "lora.target_modules: 'query' matches no layer"),
    ],
)
def test_a_model_that_training_would_refuse_is_a_fail(qwen, content, lora, said):
    (qwen / "config.json").unlink()
    if content is not None:
        (qwen / "config.json").write_text(content)
    config = with_params(lora=lora).model_copy(update={"model": SimpleNamespace(source="local", path=str(qwen))})
    [finding] = doctor._run_check("memory", lambda: checks.check_model(config, circumstances()))
    assert (finding.check, finding.status) == ("memory", "fail")
    assert said in finding.text


HUB = """
import logging, os, sys
from pathlib import Path
from types import SimpleNamespace
from lathe.doctor import doctor
from lathe.common import paths
from toy import load_toy
model = SimpleNamespace(source="hub", id="org/name", revision="main", file=None)
config = load_toy().model_copy(update={"model": model})
def print_findings():
    for finding in doctor.check_model(config, doctor.Circumstances(paths.ROOT, os.environ)):
        print(finding.check, finding.status, finding.text)
print_findings()
folder = Path(sys.argv[1]) / "hub/models--org--name"
snapshot = folder / "snapshots" / ("0123456789abcdef" * 3)[:40]
snapshot.mkdir(parents=True)
(folder / "refs").mkdir()
(folder / "refs/main").write_text(snapshot.name)
(snapshot / "config.json").write_text(sys.argv[2])
print("cached")
print_findings()
"""


@pytest.mark.heavy
def test_a_model_of_a_hub_is_estimated_from_the_hubs_cache_alone(tmp_path):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path), json.dumps(QWEN)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = done.stdout.split("cached\n")
    assert before.startswith(
        "memory warning cannot be estimated: config.json of org/name is neither in the hub's cache"
    )
    assert "weights 538 MB" in after


def test_one_check_that_breaks_stops_no_other(tmp_path):
    """In an empty folder nearly everything fails, each in a line of its own."""
    findings = doctor.examine(lambda: CONFIG, circumstances(tmp_path))
    status = {finding.check: finding.status for finding in findings}
    assert status["packages"] == "fail"
    assert status["repository"] == "fail"
    assert status["python"] == "ok"
    assert status["llama.cpp"] == "ok"
    assert status["memory"] == "ok"
    assert all("\n" not in finding.text for finding in findings)


def test_fp16_without_a_gpu_is_a_fail():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = with_params(training={"precision": "fp16"})
    findings = {finding.check: finding for finding in doctor.examine(lambda: config, circumstances())}
    assert findings["device"].status == "fail"
    assert "needs a CUDA device" in findings["device"].text


def test_lines_are_aligned_and_coloured_only_where_asked():
    findings = [Finding("a", "ok", "text"), Finding("longer", "warning", "text", "remedy")]
    assert shown(findings) == "ok       a       text\nwarning  longer  text; remedy\n"
    assert "\033[33mwarning " in "".join(doctor.format_findings(findings, coloured=True))


@pytest.mark.heavy
def test_the_command_answers_with_its_exit_code(checkout):
    """A right checkout 0, a broken one 1, bad parameters 2, and in each every check is still there."""
    checkout.environment |= {"PYTHONPATH": str(checkout.root / "src"), "HF_TOKEN": "hf_s3cr3t"}

    def consulted(*arguments: str) -> tuple[int, dict[str, list[str]], str]:
        done = checkout.run("python3", "-m", "lathe", "doctor", *arguments, check=False)
        assert "\033" not in done.stdout
        assert "s3cr3t" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        status: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            status.setdefault(line.split()[1], []).append(line.split()[0])
        return done.returncode, status, done.stdout

    code, right, _ = consulted()
    assert code == 0
    assert {"python", "packages", "parameters", "repository", "device", "threads", "memory", "disk"} <= set(right)
    assert {"llama.cpp", "converter", "links", "remotes", "credentials"} <= set(right)

    code, broken, text = consulted("-S", "convert.llama_cpp_dir=nowhere")
    assert (code, broken["converter"]) == (1, ["fail"]), text
    assert set(broken) == set(right)

    checkout.set({"lora.r": 0, "training.max_length": 1})
    code, bad, text = consulted()
    assert (code, bad["parameters"]) == (2, ["fail", "fail"]), text
    assert bad["converter"] == ["ok"]

    done = checkout.run("python3", "-m", "lathe", "doctor", "--json", check=False)
    assert [(found["status"], found["check"]) for found in json.loads(done.stdout)] == [
        tuple(line.split()[:2]) for line in text.splitlines()
    ]


def test_without_packages_the_doctor_says_which_and_other_commands_name_it():
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not python.exists():
        pytest.skip(f"no {python}")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(paths.ROOT / "src")}
        command = [str(python), "-s", "-m", "lathe", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    if subprocess.run([str(python), "-s", "-c", "import ruamel.yaml, torch"], capture_output=True).returncode == 0:
        pytest.skip(f"{python} has the packages too")
    done = run("doctor")
    assert done.returncode == 1
    assert "fail     packages    torch is not installed" in done.stdout
    assert "ok       repository" in done.stdout
    assert "Traceback" not in done.stderr
    done = run("config")
    assert done.returncode == 1
    assert "`python -m lathe doctor` tells what else is missing" in done.stderr


@pytest.mark.parametrize(
    ("keys", "environment", "expected"),
    [
        ({}, {}, ("ok", "none is asked: judge.enabled is false")),
        ({"enabled": True}, {}, ("warning", "OPENAI_API_KEY is not set; judge.provider openai needs it")),
        ({"enabled": True}, {"OPENAI_API_KEY": "sk-secret"}, ("ok", "OPENAI_API_KEY is set")),
        ({"enabled": True, "base_url": "http://127.0.0.1:8000/v1"}, {}, ("ok", "a server of your own may need none")),
        (
            {"enabled": True, "provider": "gemini"},
            {"OPENAI_API_KEY": "sk-secret"},
            ("warning", "GEMINI_API_KEY is not"),
        ),
        ({"enabled": True, "provider": "gigachat"}, {}, ("warning", "GIGACHAT_CREDENTIALS is not set")),
        ({"enabled": True, "provider": "gguf", "model": "no.gguf"}, {}, ("fail", "no.gguf is not there")),
        ({"enabled": True, "provider": "gguf", "model": "README.md"}, {}, ("ok", "README.md is there")),
    ],
)
def test_a_judge_without_its_key_is_told_before_it_is_asked(keys, environment, expected):
    [finding] = checks.check_judge(with_params(judge=keys), circumstances(**environment))
    assert (finding.status, expected[1] in finding.text) == (expected[0], True)
    assert "sk-secret" not in finding.text + finding.remedy
