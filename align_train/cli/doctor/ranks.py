"""Which processes look at the machine together: those that srun started, or as many as are asked for."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig, OmegaConf

from align_train.processes import check_job_name

PATIENCE = 30.0  # seconds of waiting for other ranks, after which a rank says so
LIMIT = 60.0  # after which it gives up: one that has died before it joined never comes


def join_ranks(config: DictConfig) -> torch.device:
    """Make the processes known to each other, if there are several; the device of this one.

    Raises:
        ValueError: devices that are not there, or tasks of Slurm that Lightning would not take for ranks.
        OSError: the others cannot be reached.
    """
    devices, nodes = asked_ranks(config)
    if (devices, nodes) == (1, 1):
        with_gpu = config.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if with_gpu else "cpu")
    from align_train.cli.evaluate import start_ranks  # brings Lightning, which one process can do without

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # each rank would tell that it is there, twice
    check_visible(config.device, devices)
    words = OmegaConf.create({"device": config.device, "devices": devices, "num_nodes": nodes})
    try:
        with told_to_wait(devices * nodes):
            return start_ranks(words)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"{_me()} cannot reach the other ranks ({reason}): {_where()}") from error


def asked_ranks(config: DictConfig) -> tuple[int, int]:
    """Processes of each node, and nodes: as the settings say, else as srun started them, else one.

    Raises:
        ValueError: Lightning would not take these tasks of Slurm for ranks.
    """
    tasks = int(os.environ["SLURM_NTASKS"]) if "SLURM_STEP_ID" in os.environ else 1
    if tasks == 1:
        return config.devices or 1, config.num_nodes or 1
    check_job_name()
    each = os.environ.get("SLURM_NTASKS_PER_NODE")
    if each is None:
        raise ValueError(
            f"srun started {tasks} tasks, but not with --ntasks-per-node, by which Lightning knows them: give that "
            "instead of --ntasks"
        )
    return config.devices or int(each), config.num_nodes or int(os.environ["SLURM_NNODES"])


def check_visible(kind: str, ranks: int) -> None:
    """Raise ValueError where this machine has GPUs, and fewer of them than ranks that each need one."""
    there = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else ranks
    if there < ranks:
        raise ValueError(
            f"{_me()} sees {there} GPU(s), and there are {ranks} ranks on each node: give as many tasks as GPUs, and "
            "under Slurm --gpus-per-node instead of --gpus-per-task, since each rank must see all GPUs of its node"
        )


@contextmanager
def told_to_wait(ranks: int) -> Iterator[None]:
    """Say so on standard error where the work within it takes long, for it waits for other ranks; end after LIMIT.

    Torch would wait for half an hour, in calls that no exception reaches: the process ends with 1 where it stands.
    """

    def tell() -> None:
        print(f"{_me()} still waits for others of {ranks} ranks: {_where()}", file=sys.stderr, flush=True)

    def give_up() -> None:
        missing = f"those of ranks 0 to {ranks - 1} that do not say this are missing, and have said why if they failed"
        print(f"{_me()} has waited for {LIMIT:g} s, and gives up: {missing}", file=sys.stderr, flush=True)
        os._exit(1)

    timers = [threading.Timer(PATIENCE, tell), threading.Timer(LIMIT, give_up)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _me() -> str:
    return f"rank {os.environ.get('SLURM_PROCID') or os.environ.get('LOCAL_RANK') or 0} on {socket.gethostname()}"


def _where() -> str:
    first = f"{os.environ.get('MASTER_ADDR', 'the first node')}:{os.environ.get('MASTER_PORT', 'its port')}"
    return (
        f"check that all of them are running, that this node reaches {first}, and, with several networks, "
        "that NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the one between the nodes"
    )
