"""A SLURM job, as its own processes see it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A step of a job that Slurm runs, as its environment has it.

    Attributes:
        cluster: name of the cluster.
        number: the job's id, which comes again when Slurm's records are wiped.
        name: of the job.
        user: whose it is.
        folder: where it was submitted.
        restart: times that the job was queued again before.
        step: number of the srun within the job.
        launch: address and port of that srun, which all its processes are told.
    """

    cluster: str
    number: str
    name: str
    user: str
    folder: str
    restart: int
    step: int
    launch: str = ""

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> "Job | None":
        """The job that this process is of; None outside of one."""
        if "SLURM_JOB_ID" not in environment:
            return None
        names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_USER", "SLURM_SUBMIT_DIR")
        cluster, number, name, user, folder = (environment.get(each, "") for each in names)
        restart, step = (environment.get(each) or "0" for each in ("SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
        launch = ":".join(environment.get(each, "") for each in ("SLURM_LAUNCH_NODE_IPADDR", "SLURM_SRUN_COMM_PORT"))
        return cls(cluster, number, name, user, folder, int(restart), int(step), launch)

    @property
    def whose(self) -> dict[str, str]:
        """What all starts of one job have in common."""
        return {each: getattr(self, each) for each in ("cluster", "number", "name", "user", "folder")}

    @property
    def turn(self) -> list[int]:
        """Which start it is: each is larger than those before it."""
        return [self.restart, self.step]
