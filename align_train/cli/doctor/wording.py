"""How `align-train doctor` words what it tells in more than one place."""

from collections.abc import Sequence


def line(name: str, text: str) -> str:
    """A line of the report, below its heading; without a name it goes on with the line before."""
    return f"  {name:<9} {text}".rstrip()


def ranks(numbers: Sequence[int]) -> str:
    """`rank 0`, `ranks 0, 1`."""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
