"""Three hosts on one machine, each in namespaces of its own: one to work at, two to run on.

Between them are sshd, an S3 server that checks signatures, and PostgreSQL. A host that is cut off loses its network,
and works on; one that is killed loses all of its processes at once.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Checkout, copy_of
from network_hosts import Network, NetworkHost, find_missing, network
from s3_server import S3Server, s3_server
from test_remote_search import SEARCH, command, wait_for
from test_remotes import ENVIRONMENT, client, intact
from test_search_database import PASSWORD, PROGRAMS, Server
from training_checkout import list_checkpoints, list_outputs, make_training_checkout

from lathe.common import paths

# A host that is cut off is waited for until another takes its trial over, which takes minutes in itself.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
SETUP = f"ln -sfn {sys.prefix} .venv; ln -sfn {paths.LLAMA_CPP} .llama.cpp"
BUCKET = "team"


class Desk(Checkout):
    """A checkout on a host, where its commands run."""

    def __init__(self, root: Path, environment: dict[str, str], host: NetworkHost) -> None:
        super().__init__(root, environment)
        self.host = host

    def run(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command there."""
        return super().run(*self.host.build_command(self.root, command), check=check, **options)


class Place:
    """The network, with a checkout at the desk, a copy of it on a machine without a network, and the S3 server."""

    def __init__(self, made: Network, s3: S3Server, desk: Desk, alone: Checkout) -> None:
        self.network, self.s3, self.desk, self.alone = made, s3, desk, alone
        self.box, self.den = made.hosts["box"], made.hosts["den"]

    def folder(self, host: NetworkHost) -> Path:
        """Return the folder on a host with all that Lathe has there."""
        return host.home / "lathe/lathe"

    def log(self, host: NetworkHost, run: str) -> str:
        """Return what a run has printed there."""
        return (self.folder(host) / "runs" / run / "log").read_text()


def make_place(made: Network, s3: S3Server, small_model: Path, changes: dict[str, Any], files: dict[str, str]) -> Place:
    """Boot the hosts, and commit a checkout with changed parameters and further files at the desk."""
    desk = made.hosts["desk"]
    checkout = make_training_checkout(desk.home / "lathe", small_model)
    checkout.set(changes)
    for name, text in files.items():
        (checkout.root / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.root / name).write_text(text)
    client(s3).create_bucket(Bucket=BUCKET)
    for key, value in (("url", f"s3://{BUCKET}/dvc"), ("endpointurl", s3.url)):
        checkout.run("dvc", "remote", "modify", "ycloud", key, value)
    checkout.commit()
    alone = copy_of(checkout, made.folder / "alone/lathe").without_preloading()
    alone.environment["PYTHONPATH"] = str(alone.root / "src")
    # The keys of the remote are nowhere but in the environment of each host's user.
    exports = "".join(f"export {name}={value}\n" for name, value in ENVIRONMENT.items())
    for name in ("box", "den"):
        (made.hosts[name].home / ".profile").write_text(exports)
    made.boot()
    environment = {**checkout.environment, **ENVIRONMENT, "HOME": str(desk.home), "SSH_AUTH_SOCK": ""}
    environment["GIT_SSH_COMMAND"] = f"ssh -F {made.introduce('desk', ['box', 'den'])}"
    return Place(made, s3, Desk(checkout.root, environment, desk), alone)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Network, S3Server]]:
    """The hosts, not started yet, and an S3 server that they reach."""
    if (missing := find_missing()) is not None:
        pytest.skip(missing)
    (tmp_path / "s3").mkdir()
    (tmp_path / "alone").mkdir()
    with network(tmp_path, ["desk", "box", "den"]) as made, s3_server(tmp_path / "s3", address=made.address) as s3:
        yield made, s3


@pytest.fixture
def database(hosts: tuple[Network, S3Server]) -> Iterator[Server]:
    """PostgreSQL, which the hosts reach."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed: `apt-get install postgresql`")
    folder = Path(tempfile.mkdtemp())
    server = Server(folder, hosts[0].address, hosts[0].subnet)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


def hash_adapter(checkout: Checkout, experiment: str) -> str:
    """Return the hash of the folder that DVC has of an experiment's adapter; the other outputs are in Git."""
    ref = checkout.run("git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{experiment}").stdout.strip()
    outputs = yaml.safe_load(checkout.run("git", "show", f"{ref}:dvc.lock").stdout)["stages"]["train"]["outs"]
    return next(output["md5"] for output in outputs if output["path"] == "models/adapter")


def list_steps(checkouts: Path) -> dict[str, int]:
    """Return the last step in the curve of each trial that trains below a folder."""
    found = {}
    for file in checkouts.glob(".dvc/tmp/search/*/metrics/train/plots/metrics/train/loss.tsv"):
        lines = file.read_text().split("\n")[1:-1]
        found[file.relative_to(checkouts / ".dvc/tmp/search").parts[0]] = int(lines[-1].split("\t")[0]) if lines else 0
    return found


def test_a_run_whose_host_is_cut_off_and_then_killed_ends_with_the_bytes_of_one_here(
    hosts: tuple[Network, S3Server], small_model: Path
) -> None:
    place = make_place(*hosts, small_model, {}, {})
    desk, box = place.desk, place.box
    run = ("run", "longer", "-S", "training.max_steps=1000")
    start = command(*run, "--host", "box", "--dvc-remote", "ycloud", "--setup", SETUP)
    ended = place.folder(box) / "runs/longer/exit"
    checkout = place.folder(box) / "checkout"

    def told() -> str:
        return place.log(box, "longer")

    desk.run(*start)
    wait_for(lambda: list_checkpoints(checkout), told, 300)

    box.cut_off()
    before = list_checkpoints(checkout)[-1]
    unreachable = desk.run(*command("status", "longer"), check=False)
    assert unreachable.returncode == 2
    assert unreachable.stderr.startswith("error: box: ssh: connect to host "), unreachable.stderr
    assert unreachable.stderr.count("\n") == 1
    wait_for(lambda: list_checkpoints(checkout)[-1:] > [before], told, 300)  # nobody has told the training
    box.join()
    wait_for(lambda: desk.run(*command("status", "longer"), check=False).stdout.rstrip().endswith("running"), told, 60)

    assert not ended.exists(), told()
    box.kill()
    last = list_checkpoints(checkout)[-1]
    assert desk.run(*command("status", "longer"), check=False).returncode == 2
    box.boot()
    assert "killed, or its host restarted" in desk.run(*command("status", "longer")).stdout
    desk.run(*start)
    wait_for(ended.exists, told, 300)
    assert desk.run(*command("status", "longer")).stdout.rstrip().endswith("done"), told()
    assert f"going on after step {last.name.rpartition('-')[2]}" in told()
    assert desk.run(*command("fetch", "longer")).stdout.startswith("longer: ")

    place.alone.run(sys.executable, "-m", "lathe", *run)
    expected = list_outputs(place.alone, "longer")
    assert list_outputs(desk, "longer") == expected
    assert hash_adapter(desk, "longer") in intact(place.s3, BUCKET)
    desk.run("dvc", "exp", "apply", "longer")
    desk.run("dvc", "checkout")
    for file in sorted((place.folder(box) / "checkout/.dvc").rglob("config*")):
        assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in file.read_text()
    mine, expected_files = (
        {file.name: file.read_bytes() for file in (checkout.root / "models/adapter").iterdir()}
        for checkout in (desk, place.alone)
    )
    assert mine == expected_files


def test_a_run_that_ends_while_its_host_is_cut_off_is_delivered_by_the_same_command(
    hosts: tuple[Network, S3Server], small_model: Path
) -> None:
    place = make_place(*hosts, small_model, {}, {})
    desk, box = place.desk, place.box
    start = command("run", "longer", "--host", "box", "--dvc-remote", "ycloud", "--setup", SETUP)
    ended = place.folder(box) / "runs/longer/exit"
    desk.run(*start)
    wait_for(lambda: list_checkpoints(place.folder(box) / "checkout"), lambda: place.log(box, "longer"), 300)
    box.cut_off()
    wait_for(ended.exists, lambda: place.log(box, "longer"), 900)
    told = place.log(box, "longer")
    box.join()
    assert ended.read_text().strip() == "2", told
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    assert re.match(r"error: ycloud .* at http://\S+: nobody answers there; ", last), told
    assert "failed with 2" in desk.run(*command("status", "longer")).stdout

    ended.unlink()
    desk.run(*start)
    wait_for(ended.exists, lambda: place.log(box, "longer"), 120)
    assert desk.run(*command("status", "longer")).stdout.rstrip().endswith("done"), place.log(box, "longer")
    assert "longer: had been run already" in place.log(box, "longer")
    assert desk.run(*command("fetch", "longer")).stdout.startswith("longer: ")
    assert hash_adapter(desk, "longer") in intact(place.s3, BUCKET)


LONGER_SEARCH = SEARCH.replace("n_trials: 5", "n_trials: 8")
FILE = "experiments/search/spread.yaml"


def test_a_search_of_which_one_host_is_killed_and_one_is_cut_off_is_that_of_one_machine(
    hosts: tuple[Network, S3Server], database: Server, small_model: Path
) -> None:
    # Evaluation is no stage here: every trial has the score of the commit.
    scores = json.dumps([{"merged": {"rouge_l": 0.5}}])
    changes = {"training.max_steps": 400, "training.eval_steps": 200, "training.save_steps": 40}
    place = make_place(*hosts, small_model, changes, {FILE: LONGER_SEARCH, "metrics/evaluate/validation.json": scores})
    desk, box, den = place.desk, place.box, place.den
    desk.environment["LATHE_SEARCH_STORAGE"] = database.url
    start = command("search", FILE, "--hosts", "box,den", "--dvc-remote", "ycloud", "--setup", SETUP)
    desk.run(*start)

    def log(host: NetworkHost) -> str:
        return place.log(host, f"spread-on-{host.name}")

    def told() -> str:
        return f"--- box\n{log(box)}\n--- den\n{log(den)}"

    def have_both_delivered() -> bool:
        assert " failed: " not in told(), told()
        return all(": delivered to origin" in log(host) for host in (box, den))

    def is_training(host: NetworkHost) -> str | None:
        """Return the trial in whose middle a host is."""
        steps = list_steps(place.folder(host) / "checkout")
        return next((name.rpartition("-")[0] for name, step in steps.items() if step > 60), None)

    def ended(host: NetworkHost) -> Path:
        """Return the file in which a run has its exit code at its end."""
        return place.folder(host) / f"runs/spread-on-{host.name}/exit"

    # den has delivered a trial, and is killed in the middle of another, which box takes over.
    wait_for(have_both_delivered, told, 300)
    wait_for(lambda: is_training(den), told)
    den.kill()
    cut_short = is_training(den)
    assert cut_short is not None
    number = int(cut_short.rpartition("-")[2])
    here = [sys.executable, "-m", "lathe", "search", FILE]
    with (place.network.folder / "alone/log").open("w") as file:
        alone = subprocess.Popen(here, cwd=place.alone.root, env=place.alone.environment, stdout=file, stderr=file)
    try:
        wait_for(lambda: is_training(box) == cut_short, told, 600)
        assert f"trial {number} was interrupted" in log(box)

        # box is cut off in the middle of that trial. den is started again, and takes it over while box works on.
        box.cut_off()
        den.boot()
        desk.run(*command("search", FILE, "--hosts", "den", "--dvc-remote", "ycloud", "--setup", SETUP))
        both = desk.run(*command("status", "spread"))
        assert "box  since" in both.stdout
        assert "unknown: box: ssh: connect to host" in both.stdout
        assert both.stdout.rstrip().endswith("running")
        wait_for(lambda: f"trial {number} was interrupted" in log(den), told, 600)
        box.join()
        wait_for(lambda: all(ended(host).exists() for host in (box, den)), told, 900)

        # The same command finds nothing to do, but to deliver what has not been.
        desk.run(*start)
        wait_for(lambda: all(ended(host).exists() for host in (box, den)), told)
        states = desk.run(*command("status", "spread")).stdout.splitlines()
        assert [line.split("+00:00  ")[-1] for line in states] == ["done", "done"], told()
        desk.run(*command("fetch", "spread"))
        assert alone.wait(900) == 0, (place.network.folder / "alone/log").read_text()
    finally:
        alone.kill()

    # The study is whole.
    again = desk.run(sys.executable, "-m", "lathe", "search", FILE)
    assert "8 trials ended, 0 of them failed" in again.stdout
    trials = json.loads((desk.root / "metrics/search/spread/study.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 8
    refs = desk.run(
        "git", "for-each-ref", "--format=%(refname:lstrip=4) %(objectname)", "refs/exps/*/*/spread-*"
    ).stdout
    known = dict(line.split(" ") for line in refs.splitlines())
    assert {f"spread-{trial['number']}": trial["commit"] for trial in trials} == known
    # What each trial made is that of one machine, has come home, and is in the bucket.
    arrived = intact(place.s3, BUCKET)
    expected = json.loads((place.alone.root / "metrics/search/spread/study.json").read_text())["trials"]
    assert [trial["parameters"] for trial in trials] == [trial["parameters"] for trial in expected]
    for name in known:
        assert list_outputs(desk, name) == list_outputs(place.alone, name)
        assert hash_adapter(desk, name) in arrived
        desk.run("git", "checkout", "--quiet", known[name])
        desk.run("dvc", "checkout")
    for host in (box, den):
        files = [file.read_bytes() for file in place.folder(host).joinpath("runs").rglob("*") if file.is_file()]
        assert not any(PASSWORD.encode() in content for content in files)
