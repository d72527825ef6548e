"""OpenSSH's own server on 127.0.0.1, with keys and a port of its own: from Debian's openssh-server."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class SshServer:
    """A server that lets this user in by one key, and a configuration for the client that knows it as `box`."""

    def __init__(self, folder: Path, name: str = "box") -> None:
        assert SSHD is not None
        self.folder, self.name = folder, name
        (folder / "home").mkdir(parents=True, mode=0o700)
        folder.chmod(0o700)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        public = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile {folder}/pid\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
            f"MaxStartups 50\nSetEnv HOME={folder}/home\n"
        )
        (folder / "ssh_config").write_text(
            f"Host {name}\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
            "  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n"
        )
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Git and Lathe reach the server, and none of another agent."""
        return {"GIT_SSH_COMMAND": f"ssh -F {self.folder}/ssh_config", "SSH_AUTH_SOCK": ""}

    def start(self) -> None:
        """Start it, and wait until it listens."""
        assert SSHD is not None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # which it asks for as root
        command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self.process = subprocess.Popen(command, stderr=(self.folder / "log").open("ab"))
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self) -> None:
        """End it, as a machine that is cut off: what it has started runs on."""
        self.process.terminate()
        self.process.wait()
