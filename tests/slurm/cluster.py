"""A real Slurm cluster of several nodes on this machine, for tests: its own daemons in namespaces of their own."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slurm.job import Job
from slurm.namespaces import APART, Namespaces

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "nsenter", "mount", "hostname")
PREFIX = "align-slurm-"  # of the folder of a cluster
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
SETTINGS = Path(__file__).with_name("slurm.conf")


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if sys.platform != "linux":
        return "Slurm runs on Linux"
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"{missing[0]} is missing: apt-get install munge slurmctld slurmd slurm-client"
    tried = subprocess.run([*APART, "true"], capture_output=True, text=True, check=False)
    return f"no namespaces here, {tried.stderr.strip()}" if tried.returncode else None


def locked(folder: Path) -> int | None:
    """A lock on it, which goes with this process however that ends; None where another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def clear_away() -> None:
    """Remove what clusters have left behind whose process was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if (lock := locked(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


class Cluster:
    """Runs from `with` to the end of its block, and leaves nothing behind.

    Partitions: main; low, whose jobs are preempted (20 s of grace, then queued again) by those of main and high.
    """

    def __init__(self, nodes: int = 2, cpus: int = 8) -> None:
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.cpus = cpus
        clear_away()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # short: a socket's path may have 107 characters
        self._lock = locked(self.folder)
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        self._write_settings()
        self._inside = Namespaces(self.folder / "etc" / "hosts")
        try:
            self.start("munged", *self._munged())
            self.wait_until((self.folder / "munge" / "socket").exists, 20, "munged")
            self.start("slurmctld", "slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self.wait_until(self._ready, 40, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._inside.close()
        shutil.rmtree(self.folder)
        if self._lock is not None:
            os.close(self._lock)

    # Using it

    def run(self, *words: str, folder: Path | None = None) -> str:
        """What a client such as squeue says; AssertionError if it fails."""
        command = self._inside.words(*words)
        done = subprocess.run(
            command, env=self.environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: status {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *words: str, options: Sequence[str] = (), folder: Path) -> Job:
        """`sbatch OPTIONS SCRIPT WORDS`, typed in `folder`."""
        return self.job(self.run("sbatch", "--parsable", *options, str(script), *words, folder=folder).strip())

    def job(self, number: str) -> Job:
        """The job of that id."""
        found = re.search(r"StdOut=(.*)", self.run("scontrol", "show", "job", number))
        assert found is not None
        return Job(self, number, Path(found[1]))

    def set_node(self, node: str, state: str) -> None:
        """`scontrol update`: DOWN, DRAIN, RESUME ..."""
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    def environments(self) -> dict[int, set[str]]:
        """What the processes of daemons and jobs have been started with, as NAME=VALUE, by process id."""
        found = {}
        for pid in self._inside.processes():
            try:
                found[pid] = set(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
            except OSError:  # ended meanwhile
                continue
        return found

    def clear(self) -> None:
        """Between two tests: no jobs, and all nodes up."""
        self.run("scancel", "--user=root")
        for node in self.nodes:
            if not re.match("idle|mixed|alloc|comp", self.run("sinfo", "-h", "-n", node, "-o", "%T")):
                self.set_node(node, "RESUME")
        self.wait_until(self._ready, 40, "the nodes")

    # Its daemons

    def start(self, name: str, *command: str, host: str = "slurmctl") -> None:
        """Start a daemon."""
        with (self.folder / "log" / name).open("ab") as output:
            self._inside.start(host, command, self.environment, output)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, for the first time or after `kill_node`."""
        self.start(node, "slurmd", "-D", "-N", node, host=node)

    def wait_until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until it holds, or fail with what the daemons have written."""
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                logs = "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in (self.folder / "log").iterdir())
                raise AssertionError(f"{what}: not within {seconds} s\n{logs}")
            time.sleep(0.05)

    def _ready(self) -> bool:
        try:
            return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * len(self.nodes)
        except AssertionError:  # slurmctld does not answer yet
            return False

    def _munged(self) -> list[str]:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return ["munged", "--foreground", *(f"--{name}={self.folder}/munge/{file}" for name, file in files.items())]

    def _write_settings(self) -> None:
        self.folder.chmod(0o755)
        for name in ("etc", "munge", "state", "spool", "run", "log"):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "munge" / "key").touch(0o600)
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        names = ["localhost", "slurmctl", *self.nodes]
        (self.folder / "etc" / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names))
        # Slurm 22.05 always loads a cgroup plugin; this one has nothing to do, and nothing to do it with.
        (self.folder / "etc" / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint={self.folder}/none\n"
        )
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={6818 + number} CPUs={self.cpus} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=64000 State=UNKNOWN"
            for number, node in enumerate(self.nodes)
        ]
        settings = SETTINGS.read_text().replace("FOLDER", str(self.folder)).replace("NODES\n", "\n".join(lines) + "\n")
        (self.folder / "etc" / "slurm.conf").write_text(settings)
