"""A test's images, read and decoded by threads while the model is busy with those before."""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from xxhash import xxh3_64_intdigest

from align_train.corpus.images import WHITE, Unusable
from align_train.data.crew import Crew
from align_train.data.inputs import Inputs
from align_train.data.testsets import Images

TOGETHER = 16  # images that a thread reads one after the other
AHEAD = 2  # batches that are read while one is used

Found = tuple[np.ndarray | None, int, str]  # pixels (H, W, 3) or why there are none, and the hash of the file


@dataclass(frozen=True)
class ReadImages:
    """B images of a test.

    Attributes:
        pixels: (B, 3, H, W), channels_last in memory; blank where an image cannot be used.
        hashes: int64 (B,), XXH3 of the files; 0 where one could not be read.
        lost: why images cannot be used, by number.
    """

    pixels: Tensor
    hashes: Tensor
    lost: Mapping[int, str]


def read_images(
    images: Images, inputs: Inputs, batches: Iterable[Sequence[int]], threads: int, stall_seconds: float
) -> Iterator[ReadImages]:
    """The images of each batch of numbers, in their order.

    Raises:
        OSError: a disk fails.
        TimeoutError: one does not answer.
    """
    crew, coming = Crew(threads), deque[tuple[Sequence[int], list[Future[list[Found]]]]]()
    blank = inputs.image(_blank(), "a blank image").transpose(1, 2, 0)
    try:
        for numbers in batches:
            parts = [numbers[first : first + TOGETHER] for first in range(0, len(numbers), TOGETHER)]
            coming.append((numbers, [crew.submit(_read, images, inputs, part) for part in parts]))
            if len(coming) > AHEAD:
                yield _collected(images, *coming.popleft(), blank, stall_seconds)
        while coming:
            yield _collected(images, *coming.popleft(), blank, stall_seconds)
    finally:
        crew.dismiss()


def _collected(
    images: Images,
    numbers: Sequence[int],
    futures: Sequence["Future[list[Found]]"],
    blank: np.ndarray,
    stall_seconds: float,
) -> ReadImages:
    found: list[Found] = []
    for future in futures:
        try:
            found += future.result(stall_seconds)
        except TimeoutError as error:
            where = images.where(numbers[len(found)])
            raise TimeoutError(
                f"no answer for {stall_seconds:g} seconds near {where}: check its disk or network ({error})"
            ) from None
    pixels = np.stack([blank if pixels is None else pixels for pixels, _, _ in found])
    hashes = torch.from_numpy(np.array([known for _, known, _ in found], np.uint64).view(np.int64))
    lost = {number: why for number, (pixels, _, why) in zip(numbers, found, strict=True) if pixels is None}
    return ReadImages(torch.from_numpy(pixels).permute(0, 3, 1, 2), hashes, lost)


def _read(images: Images, inputs: Inputs, numbers: Sequence[int]) -> list[Found]:
    return [_read_one(images, inputs, number) for number in numbers]


def _read_one(images: Images, inputs: Inputs, number: int) -> Found:
    known = 0
    try:
        content = images.read(number)
        known = xxh3_64_intdigest(content)
        return inputs.image(content, images.where(number)).transpose(1, 2, 0), known, ""
    except Unusable as problem:
        return None, known, problem.reason


def _blank() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (64, 64), WHITE).save(content, "PNG")
    return content.getvalue()
