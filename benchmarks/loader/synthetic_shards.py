"""A folder of shards to measure loaders on: JPEGs like photographs with captions of COYO's length, always the same.

    python benchmarks/loader/synthetic_shards.py FOLDER [--pairs 10000] [--side 384]

The images are crops of a few canvases: noise with the spectrum of photographs and shapes with edges, JPEG quality 90,
4:2:0. COYO's captions have 11.1 words and 15.8 WordPiece tokens on average (its README); these are random words of the
shipped vocabulary, frequent ones more often.
"""

import argparse
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw
from tqdm import tqdm

from align_train.corpus.shards import write_shards
from align_train.records import Pair
from align_train.shipped import vocabulary

CANVAS, CANVASES, SHAPES = 1024, 16, 60


def make_shards(folder: Path, pairs: int = 10_000, side: int = 384) -> None:
    """Write the pairs, 1,000 a shard, with sidecars."""
    print(write_shards(tqdm(_pairs(pairs, side), desc="pairs", total=pairs), folder).described())


def pairs_in(folder: Path) -> int:
    """Captions in the tars of a folder."""
    total = 0
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            total += sum(name.endswith(".txt") for name in tar.getnames())
    return total


def images_in(folder: Path, count: int) -> list[bytes]:
    """The first JPEGs of a folder's tars."""
    images: list[bytes] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            images += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
        if len(images) >= count:
            break
    if not images:
        raise ValueError(f"{folder} holds no tar with .jpg members")
    return images[:count]


def _pairs(count: int, side: int) -> Iterator[Pair]:
    random = np.random.default_rng(0)
    canvases = [_canvas(random, smoothness) for smoothness in np.linspace(1.3, 1.7, CANVASES)]
    caption = _captions(random)
    for number in range(count):
        left, top = random.integers(0, CANVAS - side + 1, 2)
        turns, flip = random.integers(4), random.integers(2)
        pixels = np.rot90(canvases[number % CANVASES][top : top + side, left : left + side], turns)
        pixels = np.ascontiguousarray(pixels[:, :: 1 - 2 * flip])
        image = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")
        link = f"https://photos.example/{number % 97}/{number}.jpg"
        yield Pair(f"{number:09d}", image, next(caption), {"url": link, "width": side, "height": side})


def _canvas(random: np.random.Generator, smoothness: float) -> np.ndarray:
    """Pixels (CANVAS, CANVAS, 3): shapes of plain colours over and under noise whose power falls with frequency."""
    frequency = np.hypot(np.fft.fftfreq(CANVAS)[:, None], np.fft.rfftfreq(CANVAS)[None])
    frequency[0, 0] = 1
    spectrum = random.normal(size=(4, *frequency.shape)) + 1j * random.normal(size=(4, *frequency.shape))
    planes = np.fft.irfft2(spectrum / frequency**smoothness, s=(CANVAS, CANVAS))
    planes = (planes - planes.mean((1, 2), keepdims=True)) / planes.std((1, 2), keepdims=True)
    noise = (0.8 * planes[0] + 0.35 * planes[1:]).transpose(1, 2, 0)  # three quarters of the variance is grey
    drawing = Image.new("RGB", (CANVAS, CANVAS), (127, 127, 127))
    draw = ImageDraw.Draw(drawing)
    for _ in range(SHAPES):
        corners = random.integers(-300, 300, (3, 2)) + random.integers(0, CANVAS, 2)
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=tuple(random.integers(40, 215, 3).tolist()))
    return np.clip(np.asarray(drawing) + 45 * noise, 0, 255).astype(np.uint8)


def _captions(random: np.random.Generator) -> Iterator[str]:
    """Captions without end. The vocabulary lists words by frequency, so a word's weight is one over its place."""
    entries = vocabulary().read_text(encoding="utf-8").splitlines()
    words = [entry for entry in entries if entry.isascii() and entry.isalpha() and len(entry) > 1]
    endings = [entry[2:] for entry in entries if entry.startswith("##") and entry[2:].isascii() and entry[2:].isalpha()]
    weights = 1 / np.arange(10, len(words) + 10)
    weights /= weights.sum()
    while True:
        count = max(3, int(random.lognormal(2.35, 0.5)))
        chosen = [words[i] for i in random.choice(len(words), count, p=weights)]
        for place in np.flatnonzero(random.random(count) < 0.12):  # names and rare words: two tokens or more
            chosen[place] = chosen[place].capitalize() + endings[random.integers(len(endings))]
        for place in np.flatnonzero(random.random(count) < 0.08):
            chosen[place] += random.choice([",", ".", " -", " |"])
        yield " ".join(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=384, help="pixels")
    given = parser.parse_args()
    make_shards(given.folder, given.pairs, given.side)


if __name__ == "__main__":
    main()
