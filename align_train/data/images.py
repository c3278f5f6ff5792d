"""Decoded images to uint8 pixels: resize, crop, and change at random for training."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from align_train.corpus.images import WHITE, decode
from align_train.records import Preprocessing


def resize(image: Image.Image, size: int, antialias: bool) -> Image.Image:
    """A square of `size` pixels, bilinear; the aspect ratio is not kept.

    Without antialiasing it is within one grey level of tf.image.resize, the reference (golden/resize.npz).
    """
    if antialias:
        return image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    square = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=False)[0]
    return Image.fromarray(square.permute(1, 2, 0).contiguous().numpy())


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square, rounded to the upper left, as the reference's evaluation (346 to 289: offset 28)."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


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

    def __call__(self, image: Image.Image, crop: int, random: np.random.Generator) -> Image.Image:
        """Change a resized image and crop it to `crop` pixels a side."""
        if self.rotation or self.scale or self.shift:
            image = self._moved(image, random)
        left, top = random.integers(0, [image.width - crop + 1, image.height - crop + 1])
        image = image.crop((left, top, left + crop, top + crop))
        if random.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._toned(image, random) if self.contrast or self.colour else image

    def _moved(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """Rotate, scale and shift about the centre in one bilinear step."""
        angle = np.deg2rad(random.uniform(-self.rotation, self.rotation))
        zoom = 1 + random.uniform(-self.scale, self.scale)
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        x, y = image.width / 2, image.height / 2
        right, down = random.uniform(-self.shift, self.shift, 2) * image.width
        left, top = x - cos * (x + right) - sin * (y + down), y + sin * (x + right) - cos * (y + down)
        matrix = (cos, sin, left, -sin, cos, top)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=WHITE)

    def _toned(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        gain = 1 + random.uniform(-self.contrast, self.contrast)
        tint = random.uniform(-self.colour, self.colour, 3)
        levels = (np.arange(256) - 127.5) * gain + (127.5 + tint[:, None])
        table = np.clip(np.rint(levels), 0, 255).astype(np.uint8).ravel()
        return Image.fromarray(table[np.asarray(image) + np.array([0, 256, 512])])


def resized(content: bytes, preprocessing: Preprocessing, where: str = "image") -> Image.Image:
    """Encoded image to a square of `preprocessing.resize` pixels; Unusable as `decode`."""
    return resize(decode(content, where), preprocessing.resize, preprocessing.antialias)


def pixels_of(content: bytes, preprocessing: Preprocessing, where: str = "image") -> np.ndarray:
    """Encoded image to the uint8 (crop, crop, 3) of evaluation, the central crop; Unusable as `decode`."""
    return np.array(centre_crop(resized(content, preprocessing, where), preprocessing.crop))
