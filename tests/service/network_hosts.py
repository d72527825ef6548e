"""Hosts on one machine, each with a network, processes, a name and files of its own: Linux's namespaces.

A bridge joins them, and this machine is on it with an address of its own, at which servers that a test starts can
listen. On each host runs OpenSSH's server as its first process. A host can be cut off from the network, and killed:
then nothing of it runs on. Needs root, iproute2, util-linux and openssh-server.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ssh_server import SSHD

# What the first process of a host does before it is sshd: a name, and nothing to be seen of the other hosts' files, nor
# of what programs leave in /var/tmp.
BOOT = """
set -e
hostname "$1"
sshd=$2 config=$3
mount --bind "$4" /var/tmp
shift 4
for other; do mount -t tmpfs none "$other"; done
exec "$sshd" -D -e -f "$config"
"""


def find_missing() -> str | None:
    """Return why no such hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("nsenter", "util-linux"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"{program} is not installed: `apt-get install {package}`"
    if SSHD is None:
        return "sshd is not installed: `apt-get install openssh-server`"
    tried = f"lathe-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", tried], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        inner = ["unshare", "--fork", "--pid", "--mount", "--uts", "--mount-proc", "true"]
        link = f"{tried}-br"[-15:]
        for command in (["ip", "netns", "exec", tried, *inner], ["ip", "link", "add", link, "type", "bridge"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                break
        else:
            subprocess.run(["ip", "link", "del", link], check=False)
        subprocess.run(["ip", "netns", "del", tried], check=False)
    if done.returncode:
        return f"no namespaces can be made here: {done.stderr.strip() or done.returncode}"
    return None


class NetworkHost:
    """A host with an address; `folder` is all that it can see of the test's files."""

    def __init__(self, name: str, folder: Path, address: str, link: str, bridge: str) -> None:
        assert SSHD is not None
        self.name, self.folder, self.address, self.link = name, folder, address, link
        self.namespace = f"lathe-{os.getpid()}-{name}"
        self.home = folder / "home"
        self.others: Sequence[Path] = ()  # folders that it cannot see into
        self._process: subprocess.Popen[bytes] | None = None
        for below in ("home", "tmp"):
            (folder / below).mkdir(parents=True, mode=0o700)
        for key in ("host_key", "user_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(
            f"Port 22\nListenAddress {address}\nHostKey {folder}/host_key\nPidFile {folder}/pid\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
            f"MaxStartups 50\nSetEnv HOME={folder}/home TMPDIR={folder}/tmp\n"
        )
        _call("ip", "netns", "add", self.namespace)
        _call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _call("ip", "link", "set", link, "master", bridge, "up")
        _call("ip", "-n", self.namespace, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _call("ip", "-n", self.namespace, "link", "set", device, "up")

    def boot(self) -> None:
        """Start it, and wait until its sshd listens; after `kill` again, with the files that it had."""
        Path("/run/sshd").mkdir(exist_ok=True)
        command = ["ip", "netns", "exec", self.namespace, "unshare", "--fork", "--pid", "--mount", "--uts", "--ipc"]
        command += ["--mount-proc", "sh", "-c", BOOT, "sh", self.name, str(SSHD), str(self.folder / "sshd_config")]
        command.append(str(self.folder / "tmp"))
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([*command, *map(str, self.others)], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not self._listens():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _listens(self) -> bool:
        listening = _call("ip", "netns", "exec", self.namespace, "cat", "/proc/net/tcp")
        return any(line.split()[1].endswith(":0016") for line in listening.splitlines()[1:])

    def list_processes(self) -> list[int]:
        """Return the numbers of its processes, as this machine counts them."""
        return [int(number) for number in _call("ip", "netns", "pids", self.namespace).split()]

    def build_command(self, folder: Path, command: Sequence[str]) -> list[str]:
        """Return a command that runs another on the host, in a folder."""
        enter = ["nsenter", "--target", str(self._first()), "--net", "--mount", "--pid", "--uts", "--ipc", "--"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder), *command]

    def _first(self) -> int:
        """Return the number of the host's first process: the child of the one that made its namespaces."""
        assert self._process is not None
        [first] = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(first)

    def cut_off(self) -> None:
        """Pull its network cable: nothing goes in or out, and nobody is told."""
        _call("ip", "link", "set", self.link, "down")

    def join(self) -> None:
        """Put the cable back."""
        _call("ip", "link", "set", self.link, "up")

    def kill(self) -> None:
        """End all of its processes at once, as a power cut does."""
        for number in self.list_processes():
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._process:
            self._process.wait()
        deadline = time.monotonic() + 20
        while self.list_processes():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def describe(self, user_key: Path) -> str:
        """Return the lines of a client's configuration that know it by its name."""
        return (
            f"Host {self.name}\n  HostName {self.address}\n  User root\n  IdentityFile {user_key}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {user_key.parent}/known_hosts\n"
            "  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n"
        )


class Network:
    """Some hosts on a bridge; `address` is this machine's there."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        number = os.getpid() % 100_000
        prefix = f"10.{200 + number % 50}.{number % 250}"
        self.folder, self.subnet, self.address = folder, f"{prefix}.0/24", f"{prefix}.1"
        self.bridge = f"lathe{number}"
        self.hosts: dict[str, NetworkHost] = {}
        _call("ip", "link", "add", self.bridge, "type", "bridge")
        _call("ip", "address", "add", f"{self.address}/24", "dev", self.bridge)
        _call("ip", "link", "set", self.bridge, "up")
        for place, name in enumerate(names):
            link = f"lt{number}-{place}"
            self.hosts[name] = NetworkHost(name, folder / name, f"{prefix}.{place + 2}", link, self.bridge)

    def boot(self) -> None:
        """Start all hosts, which see no folder beside their own."""
        for host in self.hosts.values():
            host.others = sorted(each for each in self.folder.iterdir() if each.is_dir() and each != host.folder)
            host.boot()

    def introduce(self, user: str, others: Sequence[str]) -> Path:
        """Let the user of one host into others; return the file of its ssh that knows them."""
        folder = self.hosts[user].folder / "ssh"
        folder.mkdir(mode=0o700)
        shutil.copy(self.hosts[user].folder / "user_key", folder / "key")
        public = (self.hosts[user].folder / "user_key.pub").read_text()
        known, text = "", ""
        for name in others:
            host = self.hosts[name]
            with (host.folder / "authorized_keys").open("a") as keys:
                keys.write(public)
            known += f"{host.address} {(host.folder / 'host_key.pub').read_text()}"
            text += host.describe(folder / "key")
        (folder / "known_hosts").write_text(known)
        (folder / "config").write_text(text)
        return folder / "config"

    def remove(self) -> None:
        """End all hosts, and leave nothing of them in the system."""
        for host in self.hosts.values():
            host.kill()
            _call("ip", "netns", "delete", host.namespace)  # its end of the link goes with it, and so this one
        _call("ip", "link", "delete", self.bridge)


@contextmanager
def network(folder: Path, names: Sequence[str]) -> Iterator[Network]:
    """Make a network for as long as the block; its hosts are not started yet."""
    made = Network(folder, names)
    try:
        yield made
    finally:
        made.remove()


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
