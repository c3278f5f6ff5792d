"""Which process of a job this is, before the processes know of each other."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from align_train import signals

T = TypeVar("T")


def is_first_process() -> bool:
    """Whether this is the first process of the job, by the variables of torchrun, Lightning and Slurm.

    Once they know of each other, `distributed.rank` says it.
    """
    numbers = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name) or 0) == 0 for name in numbers)


def check_job_name() -> None:
    """Raise ValueError where srun has started several ranks, and Lightning would train each alone for its job's name.

    Lightning believes that jobs named bash or interactive are shells, from which single processes are started.
    """
    name = os.environ.get("SLURM_JOB_NAME")
    several = "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS") or 1) > 1
    if several and name in ("bash", "interactive"):
        raise ValueError(
            f"the job's name is {name}, and Lightning takes no notice of Slurm in jobs of that name, in training too: "
            "give srun --job-name=align, or sbatch --job-name=align where sbatch was given the job"
        )


def until_first_process(look: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What the first process of the job finds or makes, and the others find; they wait for it.

    Raises:
        signals.Asked: the program was asked to end meanwhile.
    """
    if (found := look()) is not None:
        return found
    if is_first_process():
        return make()
    while (found := look()) is None:
        signals.check()
        time.sleep(1.0)
    return found
