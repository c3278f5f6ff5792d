"""RUN/skipped.json: the steps whose loss was no number, and what training leaves out for them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from align_train.distributed import on_rank_zero
from align_train.files import atomic_write

FILE = "skipped.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Skipped:
    """Steps that went wrong, once.

    Attributes:
        first_step: the first of them; step s is the one whose batch is taken while `trainer.global_step` is s.
        last_step: the last of them, included.
        reason: what was wrong, as the log has it.
        rolled_back_to: step of the weights that training went on from; 0 for those of the beginning.
        left_out: what `skip` of the data returned: first_pair and pairs, or batches of a stream.
        time: of the decision, in UTC, as ISO 8601 has it.

    Raises:
        ValueError: a value that cannot be.
    """

    first_step: int
    last_step: int
    reason: str
    rolled_back_to: int
    left_out: Mapping[str, int]
    time: str = field(default_factory=_now)

    def __post_init__(self) -> None:
        numbers = [self.first_step, self.last_step, self.rolled_back_to, *self.left_out.values()]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a step or a number of pairs is not a number from 0 on")
        if self.last_step < self.first_step:
            raise ValueError(f"step {self.last_step} is before step {self.first_step}")
        if set(self.left_out) not in ({"first_pair", "pairs"}, {"batches"}):
            raise ValueError("left_out has neither first_pair and pairs nor batches")
        if datetime.fromisoformat(self.time).tzinfo is None:
            raise ValueError(f"the time {self.time} has no zone")


def read_skipped(run: Path) -> list[Skipped]:
    """What the run has skipped so far, in the order of time; nothing where the file is not there.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / FILE
    try:
        return [Skipped(**record) for record in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): bring it back from a copy, or delete it, and the pairs that the run had "
            "left out come again"
        ) from error


def note_skipped(run: Path, skipped: Skipped) -> None:
    """Add to the run's file, whole or not at all. Every rank must call it; rank 0 writes.

    Raises:
        ValueError: the file is damaged; on all ranks.
        OSError: it cannot be written; on all ranks.
    """
    on_rank_zero(lambda: _write(run, [*read_skipped(run), skipped]))


def forget_skipped(run: Path) -> None:
    """Take the record away, where another run begins in the folder."""
    (run / FILE).unlink(missing_ok=True)


def ranges(skipped: Iterable[Skipped]) -> list[tuple[int, int]]:
    """Half-open ranges of the numbers of drawn pairs that are left out, as `PairData.skipped` wants them."""
    left_out = [each.left_out for each in skipped if "pairs" in each.left_out]
    return [(found["first_pair"], found["first_pair"] + found["pairs"]) for found in left_out]


def _write(run: Path, skipped: list[Skipped]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with atomic_write(run / FILE) as file:
        file.write(json.dumps([asdict(each) for each in skipped], indent=1).encode() + b"\n")
