"""A job of the cluster: what Slurm says of it, its log, its processes, and what a test may do to it."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurm.cluster import Cluster

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
TOLD = 20_000  # characters of a log that a failure shows: tracebacks of several ranks


@dataclass(frozen=True)
class State:
    """What Slurm says of a job.

    Attributes:
        name: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED ...
        restarts: how often it was queued again.
        exit_code: of the batch script.
        signal: that ended the batch script, or 0.
        reason: why it waits, or why it ended.
        number: its own id, which in an array is another than the one that people use.
    """

    name: str
    restarts: int
    exit_code: int
    signal: int
    reason: str
    number: int

    @property
    def ended(self) -> bool:
        """True if it will not run again by itself."""
        return self.name in ENDED


@dataclass(frozen=True)
class Job:
    """A job of the cluster.

    Attributes:
        cluster: where it runs.
        id: as people write it: `7`, or `7_1` for an element of an array.
        log: what it writes, all its starts one after the other.
    """

    cluster: "Cluster"
    id: str
    log: Path

    def state(self) -> State:
        """As it is now; of an array, ask its elements."""
        said = self.cluster.run("scontrol", "show", "job", "--oneliner", self.id)
        found = dict(re.findall(r"\b(JobId|JobState|Restarts|ExitCode|Reason)=(\S+)", said.splitlines()[0]))
        code, number = map(int, found["ExitCode"].split(":"))
        return State(found["JobState"], int(found["Restarts"]), code, number, found["Reason"], int(found["JobId"]))

    def text(self) -> str:
        """What is in the log by now."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def element(self, number: int) -> "Job":
        """One of an array."""
        return self.cluster.job(f"{self.id}_{number}")

    # What a test, the cluster's owner or its scheduler does to a job

    def signal(self, name: str, *options: str) -> None:
        """Send a signal to its steps; with --batch to the batch shell, with --full to both."""
        self.cluster.run("scancel", f"--signal={name}", *options, self.id)

    def requeue(self) -> None:
        """Put it back into the queue."""
        self.cluster.run("scontrol", "requeue", self.id)

    def cancel(self) -> None:
        """End it for good."""
        self.cluster.run("scancel", self.id)

    def processes(self, rank: int = 0) -> list[int]:
        """Process ids of a rank of its running step, the rank's own first, then those that it has started."""
        wanted = {f"SLURM_JOB_ID={self.state().number}", f"SLURM_PROCID={rank}"}
        # the batch shell and srun have a SLURM_PROCID too, but no step
        environments = self.cluster.environments().items()
        return [pid for pid, words in environments if wanted <= words and any("SLURM_STEP_ID=" in w for w in words)]

    def kill(self, rank: int = 0) -> None:
        """End the first process of a rank as the kernel does where memory is short: without a word."""
        os.kill(self.processes(rank)[0], signal.SIGKILL)

    # Waiting

    def wait_until(self, condition: Callable[[], object], seconds: float = 60, what: str = "what it should do") -> None:
        """Wait until it holds, or fail with the job's state and the end of its log, at once if the job has ended."""
        limit = time.monotonic() + seconds
        while not condition():
            late = time.monotonic() > limit
            if (late or self.state().ended) and not condition():
                why = f"did not come within {seconds:.0f} s" if late else "had not come when the job ended"
                raise AssertionError(f"job {self.id}: {what} {why}\n{self.state()}\n{self.log}:\n{self.text()[-TOLD:]}")
            time.sleep(0.05)

    def wait_for(self, pattern: str, seconds: float = 60, times: int = 1) -> None:
        """Wait until the log has the regular expression so many times."""
        self.wait_until(lambda: len(re.findall(pattern, self.text())) >= times, seconds, f"{pattern!r} in the log")

    def wait(self, seconds: float = 120) -> State:
        """Its state when it has ended for good; whenever it was queued again, it need not wait as long as usual."""
        noticed: dict[int, float] = {}

        def ended() -> bool:
            state = self.state()
            waits = (state.name, state.reason) == ("PENDING", "BeginTime")
            # earlier, nodes may still refuse it (credentials are revoked by the second), and it has failed for good
            if waits and time.monotonic() > noticed.setdefault(state.restarts, time.monotonic()) + 2:
                self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            return state.ended

        self.wait_until(ended, seconds, "its end")
        return self.state()
