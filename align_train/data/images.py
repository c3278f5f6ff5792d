"""Encoded images to uint8 pixels: decode, resize, crop, and change at random for training.

Pixels are arrays (H, W, 3) of RGB.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from align_train.corpus.images import WHITE, Extent, decode, jpeg_pixels
from align_train.records import Preprocessing

# What runs side by side here are workers, not OpenCV's own threads. Set on import, since setting it in a forked process
# waits forever for threads that only the parent has.
cv2.setNumThreads(1)


def resize(pixels: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """(H, W, 3) to a square of `size` pixels, bilinear; the aspect ratio is not kept.

    Without antialiasing it is within one grey level of tf.image.resize, the reference (golden/resize.npz); with it,
    it is Pillow's.
    """
    return _square(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA), pixels.shape[1::-1], size, antialias)


def centre_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The central square, rounded to the upper left, as the reference's evaluation (346 to 289: offset 28)."""
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].copy()


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images. The defaults are the paper's: a random crop and a flip.

    Attributes:
        flip: probability of mirroring left and right.
        rotation: degrees, uniform in both directions.
        scale: share of size, uniform in both directions; the ground is white.
        shift: share of the image's side, uniform in both directions and on both axes.
        contrast: share of contrast, uniform in both directions.
        colour: grey levels (of 255) that each channel moves by, uniform in both directions.
    """

    flip: float = 0.5
    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    contrast: float = 0.0
    colour: float = 0.0

    def __call__(self, image: np.ndarray, crop: int, random: np.random.Generator) -> np.ndarray:
        """Change a resized image (H, W, 3) and crop it to `crop` pixels a side."""
        if self.moves:
            image = self._moved(image, random)
        height, width = image.shape[:2]
        left, top = self.corner(width, height, crop, random)
        return self.finished(image[top : top + crop, left : left + crop].copy(), random)

    @property
    def moves(self) -> bool:
        """Whether images are rotated, scaled or shifted, so that all of one is needed before it is cropped."""
        return bool(self.rotation or self.scale or self.shift)

    def corner(self, width: int, height: int, crop: int, random: np.random.Generator) -> tuple[int, int]:
        """Left and top of the random crop."""
        left, top = random.integers(0, [width - crop + 1, height - crop + 1])
        return int(left), int(top)

    def finished(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """What is left to change after the crop."""
        image = cv2.flip(image, 1) if random.random() < self.flip else image
        return self._toned(image, random) if self.contrast or self.colour else image

    def _moved(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Rotate, scale and shift about the centre in one bilinear step."""
        angle = np.deg2rad(random.uniform(-self.rotation, self.rotation))
        zoom = 1 + random.uniform(-self.scale, self.scale)
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        height, width = image.shape[:2]
        turn = np.array([[cos, sin], [-sin, cos]])
        shift = random.uniform(-self.shift, self.shift, 2) * width
        middle = np.array([width - 1, height - 1]) / 2  # OpenCV counts from the centre of the first pixel
        matrix = np.column_stack([turn, middle - turn @ (middle + shift)])
        return _warped(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA), matrix, (width, height), cv2.BORDER_CONSTANT)

    def _toned(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        gain = 1 + random.uniform(-self.contrast, self.contrast)
        tint = random.uniform(-self.colour, self.colour, 3)
        levels = (np.arange(256)[:, None] - 127.5) * gain + (127.5 + tint)
        return cv2.LUT(image, np.clip(np.rint(levels), 0, 255).astype(np.uint8)[None])


def resized(content: bytes, preprocessing: Preprocessing, where: str = "image", reduce: bool = False) -> np.ndarray:
    """Encoded image to a square of `preprocessing.resize` pixels (resize, resize, 3).

    Args:
        content: the file.
        preprocessing: sizes and filter.
        where: names the image in messages.
        reduce: read a JPEG at 1/2, 1/4 or 1/8 where both sides then still have `preprocessing.resize` pixels; the
            result is then nearer to the antialiased image than to the plain one.

    Raises:
        Unusable: as `decode`.
    """
    pixels, extent = _read(content, preprocessing.resize, reduce, where)
    return _square(pixels, extent, preprocessing.resize, preprocessing.antialias)


def pixels_of(content: bytes, preprocessing: Preprocessing, where: str = "image") -> np.ndarray:
    """Encoded image to the uint8 (crop, crop, 3) of evaluation, the central crop; Unusable as `decode`."""
    return centre_crop(resized(content, preprocessing, where), preprocessing.crop)


def training_pixels(
    content: bytes,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    random: np.random.Generator,
    where: str = "image",
    reduce: bool = True,
) -> np.ndarray:
    """Encoded image to the uint8 (crop, crop, 3) of training, its crop alone computed where that is possible.

    It is the augmentation of `resized`, and draws the same numbers; where the crop alone is computed, one value in
    10,000 is a grey level away.

    Raises:
        Unusable: as `decode`.
    """
    size, crop = preprocessing.resize, preprocessing.crop
    pixels, extent = _read(content, size, reduce, where)
    if preprocessing.antialias or augmentation.moves:
        return augmentation(_square(pixels, extent, size, preprocessing.antialias), crop, random)
    left, top = augmentation.corner(size, size, crop, random)
    return augmentation.finished(_part(pixels, extent, size, left, top, crop), random)


def _read(content: bytes, size: int, reduce: bool, where: str) -> tuple[np.ndarray, Extent]:
    """The decoded (H, W, 4), of which the fourth channel says nothing: OpenCV warps four twice as fast as three."""
    found = jpeg_pixels(content, (size, size) if reduce else None, "RGBX")
    if found is not None:
        return found
    image = decode(content, where)
    return cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2RGBA), image.size


def _square(pixels: np.ndarray, extent: Extent, size: int, antialias: bool) -> np.ndarray:
    """All of an image (H, W, 4) as (size, size, 3)."""
    if not antialias:
        return _part(pixels, extent, size, 0, 0, size)
    image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB))
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=(0, 0, *extent)))


def _part(pixels: np.ndarray, extent: Extent, size: int, left: int, top: int, side: int) -> np.ndarray:
    """The (side, side, 3) at left, top of an image (H, W, 4) resized to `size` a side, with half-pixel centres."""
    across, down = extent[0] / size, extent[1] / size
    matrix = np.array([[across, 0, (left + 0.5) * across - 0.5], [0, down, (top + 0.5) * down - 0.5]])
    return _warped(pixels, matrix, (side, side), cv2.BORDER_REPLICATE)


def _warped(pixels: np.ndarray, matrix: np.ndarray, size: tuple[int, int], border: int) -> np.ndarray:
    """(H, W, 4) to RGB of a width and height, bilinear; the matrix leads from there into `pixels`.

    It interpolates at exact coordinates since OpenCV 5, at 1/32 of a pixel before; cv2.resize is an eighth of a level
    too dark (INTER_LINEAR) or slower (INTER_LINEAR_EXACT).
    """
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    found = cv2.warpAffine(pixels, matrix, size, flags=how, borderMode=border, borderValue=(*WHITE, 255))
    return cv2.cvtColor(found, cv2.COLOR_RGBA2RGB)
