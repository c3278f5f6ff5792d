"""Trains, is stopped by SIGUSR1, goes on, many times in one process: `python -m slurm.many_stops TIMES [words]`."""

import signal
import sys

from hydra import compose, initialize_config_dir

from align_train import signals
from align_train.cli.train import train
from align_train.distributed import rank
from align_train.shipped import config_folder


def main() -> None:
    """Fail where a training ends in another way."""
    times, *words = sys.argv[1:]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nodes get it one after the other: this may be between two trainings
    for _ in range(int(times)):
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose("train", [*words, "folder=stopped", "resume=auto", "recovery.stall_minutes=2"])
        with signals.listening():
            try:
                train(config)
            except SystemExit as end:
                if end.code != (signals.Wish.REQUEUE.status if rank() == 0 else 0):
                    raise
            else:
                sys.exit("nothing stopped this training")


if __name__ == "__main__":
    main()
