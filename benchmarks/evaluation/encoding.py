"""Images and texts a second through the exams' `Encoder` against the training forward pass of the same towers.

    python benchmarks/evaluation/encoding.py FOLDER [--device cpu|cuda] [--model align_b3_mini] [--batch 32]
        [--images 128] [--texts 4096] [--rounds 3] [--precisions float32 bf16]

FOLDER has shards: loader/synthetic_shards.py makes them, JPEGs of 384 pixels with captions of COYO's length; for
align_sample, `align-train prepare` does. `Encoder` starts at these files: reading, hashing, decoding, resizing or
tokenizing, the towers in evaluation mode, all rows at the end on the CPU. The training forward pass starts at pixels
(uint8) or ids in host memory, and gives embeddings with what a backward pass would need; captions come in the shards'
order and are padded to the batch's longest. Batches, precision and threads are the same. All take turns in every round,
in one process that keeps freed memory as training does; the first round warms up. Ratios are medians over the rounds of
those within one. Two rows tell where the time goes: the tower alone in evaluation mode, and the reading alone.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from align_train.data import AlignInputs
from align_train.data.testsets import Images, ShardPairs
from align_train.engine import keep_freed_memory
from align_train.evaluation import Encoder, Encoding
from align_train.evaluation.reading import read_images
from align_train.models import Align, build

TRAINING, EVALUATION, READING = "training forward pass", "evaluation forward pass alone", "reading alone"
BAR = 1.0

Work = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Some:
    """The first images of a set."""

    whole: Images
    count: int

    @property
    def keys(self) -> Sequence[str]:
        return self.whole.keys[: self.count]

    @property
    def identity(self) -> str:
        return f"{self.count} of {self.whole.identity}"

    def read(self, number: int) -> bytes:
        return self.whole.read(number)

    def where(self, number: int) -> str:
        return self.whole.where(number)


@dataclass(frozen=True)
class Towers:
    """A model with fresh weights on a device, what makes its inputs, and how it computes."""

    model: Align
    inputs: AlignInputs
    device: torch.device
    encoding: Encoding

    def forward(self, encode: Callable[..., Tensor], batches: Sequence[tuple[Tensor, ...]], training: bool) -> None:
        """Embed batches of inputs in host memory."""
        self.model.train(training)
        low = self.encoding.precision == "bf16"
        with torch.set_grad_enabled(training), torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            for batch in batches:
                found = encode(*(x.to(self.device, non_blocking=True) for x in batch))
                assert found.requires_grad == training
                del found  # and the graph

    def encoder(self) -> Encoder:
        """One that has embedded nothing yet."""
        return Encoder(self.model, self.inputs, self.device, self.encoding)

    def parts(self, count: int) -> Iterator[range]:
        return (range(first, first + self.encoding.batch_size) for first in range(0, count, self.encoding.batch_size))

    def in_host_memory(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.pin_memory() for x in batch) if self.device.type == "cuda" else batch


def image_work(towers: Towers, images: Images) -> Work:
    encode = towers.model.encode_image

    def reading() -> Iterator[Tensor]:
        parts, threads = towers.parts(len(images.keys)), towers.encoding.threads
        batches = read_images(images, towers.inputs, parts, threads, stall_seconds=100)
        return (batch.pixels for batch in batches)

    decoded = [towers.in_host_memory(pixels) for pixels in reading()]
    return {
        TRAINING: lambda: towers.forward(encode, decoded, training=True),
        "`Encoder.images`": lambda: towers.encoder().images(images, "images"),
        EVALUATION: lambda: towers.forward(encode, decoded, training=False),
        READING: lambda: sum(len(pixels) for pixels in reading()),
    }


def text_work(towers: Towers, captions: Sequence[str]) -> Work:
    encode = towers.model.encode_text

    def tokenized() -> Iterator[tuple[Tensor, ...]]:
        for part in towers.parts(len(captions)):
            yield towers.in_host_memory(*towers.inputs.text([captions[number] for number in part]))

    batches = list(tokenized())
    return {
        TRAINING: lambda: towers.forward(encode, batches, training=True),
        "`Encoder.texts`": lambda: towers.encoder().texts(captions, "texts"),
        EVALUATION: lambda: towers.forward(encode, batches, training=False),
        READING: lambda: sum(len(ids) for ids, _ in tokenized()),
    }


def seconds(work: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock


def compare(towers: Towers, work: Work, count: int, kind: str, rounds: int) -> None:
    """Print the rows of one kind in one precision."""
    found = [{side: seconds(task, towers.device) for side, task in work.items()} for _ in range(rounds + 1)][1:]
    for side in work:
        speed = count / statistics.median(one[side] for one in found)
        ratios = [one[TRAINING] / one[side] for one in found]
        ratio = statistics.median(ratios)
        verdict = ("reached" if ratio >= BAR else "NOT reached") if "Encoder" in side else ""
        spread = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {kind}, {towers.encoding.precision}: {side} | {speed:,.4g} | {spread} | {verdict} |", flush=True)


def whole_batches(there: int, wanted: int, batch: int, folder: Path) -> int:
    if there < batch:
        raise SystemExit(f"{folder} has {there:,}, fewer than a batch of {batch:,}: make more")
    return min(there, wanted) // batch * batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="align_b3_mini")
    parser.add_argument("--batch", type=int, default=32, help="images, a multiple of 16, the virtual batch")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--text-batch", type=int, default=256)
    parser.add_argument("--texts", type=int, default=4096, help="0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", choices=["float32", "bf16"], nargs="+", default=["float32", "bf16"])
    parser.add_argument("--threads", type=int, default=2, help="that read, beside torch's own")
    given = parser.parse_args()
    if given.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device(given.device)
    model, pairs = build(given.model).to(device), ShardPairs(str(given.folder)).open()
    inputs = AlignInputs(model.preprocessing)  # one for all: it loads the vocabulary at the first caption
    images = Some(pairs.images, whole_batches(len(pairs.images.keys), given.images, given.batch, given.folder))
    texts = pairs.captions[: whole_batches(len(pairs.captions), given.texts, given.text_batch, given.folder)]
    machine = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{given.model}, {len(images.keys):,} images in batches of {given.batch}, {len(texts):,} captions in batches "
        f"of {given.text_batch}, {machine}, {torch.get_num_threads()} threads and {given.threads} that read, torch "
        f"{torch.__version__}, {given.rounds} rounds\n"
    )
    print(f"| what | a second | times the {TRAINING} (min to max) | at least {BAR:g} |\n|---|---|---|---|")
    for precision in given.precisions:
        towers = Towers(model, inputs, device, Encoding(given.batch, given.threads, precision))
        compare(towers, image_work(towers, images), len(images.keys), "images", given.rounds)
        if texts:
            towers = Towers(model, inputs, device, Encoding(given.text_batch, given.threads, precision))
            compare(towers, text_work(towers, texts), len(texts), "texts", given.rounds)


if __name__ == "__main__":
    main()
