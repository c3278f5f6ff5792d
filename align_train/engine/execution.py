"""How a step is carried out: what changes its time and memory, and not its result."""

from dataclasses import dataclass

from align_train.models import Align, compile_towers


@dataclass(frozen=True)
class Execution:
    """Settings of a step.

    Attributes:
        micro_batch: most pairs that a device takes at once; None for its whole share of a batch.
        text_chunks: parts of like length in which captions are encoded.
        compile_vision: torch.compile the image tower.
        compile_text: torch.compile the text tower.

    Raises:
        ValueError: a number is below 1.
    """

    micro_batch: int | None = None
    text_chunks: int = 1
    compile_vision: bool = False
    compile_text: bool = False

    def __post_init__(self) -> None:
        for name in ("micro_batch", "text_chunks"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"step.{name} is {value!r}: give a whole number of at least 1")

    def prepare(self, model: Align) -> None:
        """Make the towers work so."""
        model.text_chunks = self.text_chunks
        if self.compile_vision or self.compile_text:
            compile_towers(model, self.compile_vision, self.compile_text)
