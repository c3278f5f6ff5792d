"""Processes in namespaces of their own: a network of 127.0.0.1 alone, process ids, an /etc/hosts, a host's name."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

APART = ("unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts")
FIRST_PROCESS = """
import fcntl, signal, socket, struct, subprocess, sys
subprocess.run(["mount", "--bind", sys.argv[1], "/etc/hosts"], check=True)
network = socket.socket()
fcntl.ioctl(network, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
# getaddrinfo believes in no network (AI_ADDRCONFIG) where there is no address but 127.0.0.1
second = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("127.0.0.2"))
fcntl.ioctl(network, 0x8916, second)  # SIOCSIFADDR
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans leave no zombies
print("ready", flush=True)
sys.stdin.read()
"""


class Namespaces:
    """Stand until `close`, or until this process ends, however it does: then the kernel ends all processes in them."""

    def __init__(self, hosts: Path) -> None:
        words = [*APART, sys.executable, "-c", FIRST_PROCESS, str(hosts)]
        self._outer = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._outer.stdout is not None
        assert self._outer.stdin is not None
        if self._outer.stdout.readline() != "ready\n":
            raise OSError("no namespaces: see what unshare says above")
        self._inside = os.readlink(f"/proc/{self._outer.pid}/ns/pid_for_children")
        self._first = next(self.processes())
        self._daemons: list[subprocess.Popen[bytes]] = []

    def words(self, *command: str) -> list[str]:
        """The command, run in the network alone: a client's."""
        return ["nsenter", f"--net=/proc/{self._first}/ns/net", *command]

    def start(self, host: str, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> None:
        """Start a daemon that finds itself on `host`."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host, *command]
        words = ["nsenter", f"--target={self._first}", "--net", "--pid", "--mount", "--uts", *named]
        started = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._daemons.append(started)

    def processes(self) -> Iterator[int]:
        """Ids, as this process sees them, of all processes inside; the first one first."""
        for pid in sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == self._inside:
                    yield pid
            except OSError:  # ended meanwhile
                continue

    def close(self) -> None:
        """End every process inside, and wait until they are gone."""
        self._outer.communicate()  # closes what the first process reads
        for daemon in self._daemons:
            daemon.wait()
        while list(self.processes()):
            time.sleep(0.02)
