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
