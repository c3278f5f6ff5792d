"""A test's images, read and decoded by threads while the model is busy with those before."""

import errno
import io
import logging
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

log = logging.getLogger(__name__)
TOGETHER = 16  # images that a thread reads one after the other
AHEAD = 2  # batches that are read while one is used
UNREADABLE = "unreadable"  # why an image is lost that a disk does not give, today
TOLD = 5  # unreadable images, with what is wrong
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)  # and not of one image

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

    An image that cannot be read is lost, as one that cannot be decoded; the log says why of the first.

    Raises:
        OSError: this machine has no room, memory or open files left.
        TimeoutError: a disk does not answer.
    """
    crew, coming, told = Crew(threads), deque[tuple[Sequence[int], list[Future[list[Found]]]]](), list[str]()
    blank = inputs.image(_blank(), "a blank image").transpose(1, 2, 0)
    try:
        for numbers in batches:
            parts = [numbers[first : first + TOGETHER] for first in range(0, len(numbers), TOGETHER)]
            coming.append((numbers, [crew.submit(_read, images, inputs, part, told) for part in parts]))
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


def _read(images: Images, inputs: Inputs, numbers: Sequence[int], told: list[str]) -> list[Found]:
    return [_read_one(images, inputs, number, told) for number in numbers]


def _read_one(images: Images, inputs: Inputs, number: int, told: list[str]) -> Found:
    known = 0
    try:
        content = images.read(number)
        known = xxh3_64_intdigest(content)
        return inputs.image(content, images.where(number)).transpose(1, 2, 0), known, ""
    except Unusable as problem:
        return None, known, problem.reason
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        if error.errno in OF_THE_MACHINE:
            where = images.where(number)
            raise OSError(f"{where} cannot be read: {error}. Free what this machine is short of") from error
        if len(told) < TOLD:
            told.append(images.where(number))
            log.warning("%s cannot be read: %s", told[-1], error)
        return None, known, UNREADABLE


def _blank() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (64, 64), WHITE).save(content, "PNG")
    return content.getvalue()
