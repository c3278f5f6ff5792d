"""Signals that ask a program to end. A handler only notes the wish; whoever does the work looks when it suits."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

LAST_SECONDS = 30  # that a reading process lives on after SIGTERM: its parent needs it for the step that it is at


class Wish(IntEnum):
    """What is asked for; of several the largest holds."""

    NOTHING = 0
    INTERRUPT = 1  # Ctrl-C: end
    END = 2  # SIGTERM: end
    REQUEUE = 3  # SIGUSR1: the job's time is nearly up, end and be queued again

    @property
    def status(self) -> int:
        """Exit status of a program that did so: EX_TEMPFAIL of sysexits.h, or 128 and the signal's number."""
        return {Wish.REQUEUE: 75, Wish.END: 143, Wish.INTERRUPT: 130}.get(self, 0)


class Asked(SystemExit):
    """The program was asked to end, and does, before there is anything to save."""

    def __init__(self, wish: Wish, status: int | None = None) -> None:
        super().__init__(wish.status if status is None else status)
        self.wish = wish


_WISHES = {signal.SIGUSR1: Wish.REQUEUE, signal.SIGTERM: Wish.END}
_wish = Wish.NOTHING
_listener = 0  # the process that listens; those forked from it do not


@contextmanager
def listening() -> Iterator[None]:
    """Note SIGUSR1 and SIGTERM in this process until the block ends; forget what was noted before."""
    global _wish, _listener  # noqa: PLW0603 # a process has one set of handlers
    _wish, _listener = Wish.NOTHING, os.getpid()
    before = {number: signal.signal(number, _note) for number in _WISHES}
    try:
        yield
    finally:
        _listener = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def is_listening() -> bool:
    """Whether this process notes signals."""
    return os.getpid() == _listener


def ask(wish: Wish) -> None:
    """Note a wish."""
    global _wish  # noqa: PLW0603
    _wish = max(_wish, wish)


def wish() -> Wish:
    """What has been asked for so far."""
    return _wish


def check() -> None:
    """Raise Asked if the program was asked to end: for places where nothing would be lost."""
    if _wish:
        raise Asked(_wish)


def fulfilled() -> None:
    """Forget what was asked for: it is done, and the process may go on to something else."""
    global _wish  # noqa: PLW0603
    _wish = Wish.NOTHING


def work_to_the_end() -> None:
    """In a process that reads for one that listens: leave signals to that one, which ends both; see LAST_SECONDS."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LAST_SECONDS) and None)


def _note(number: int, frame: FrameType | None) -> None:
    if os.getpid() == _listener:
        ask(_WISHES[signal.Signals(number)])
    elif number == signal.SIGTERM:  # a process of ours that was forked
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
