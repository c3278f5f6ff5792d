"""Encoded images from the web to pixels, for the fetcher and for training alike, and to the JPEG that a shard holds."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg  # type: ignore[import-untyped]  # has no types
from PIL import ExifTags, Image, UnidentifiedImageError

from align_train.corpus.shards import image_format

MAX_PIXELS = 89_478_485  # Pillow's own warning level for a decompression bomb: 256 MB of RGB
WHITE = (255, 255, 255)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no decoder beyond these is ever tried
MODES = ("square", "keep_ratio", "original")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_LONGEST_SIDE = 65_500  # pixels; libjpeg's JPEG_MAX_DIMENSION
_UPRIGHT: dict[object, Image.Transpose] = {  # what brings each EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}  # they swap width and height

Size = tuple[int, int]  # width and height in pixels
Extent = tuple[float, float]  # the same of an image that may end within a pixel


class Unusable(Exception):
    """A pair that cannot be used. `reason` is the name it is counted under."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(f"{reason}: {where}")
        self.reason = reason


@dataclass(frozen=True)
class ImageSettings:
    """How a fetched image is stored: upright JPEG in RGB, 4:2:0, without EXIF, comment or colour profile.

    Attributes:
        size: pixels, of which the mode makes a width and a height.
        mode: `square`: `size` by `size`, aspect ratio not kept, as ALIGN trains. `keep_ratio`: the shorter side is
            `size`, the longer one rounded, as img2dataset. `original`: the image's own size.
        enlarge: False leaves what is smaller as it is: with keep_ratio an image whose shorter side is below `size`,
            with square each side below `size`, so the result may be oblong.
        filter: `area`, `bilinear`, `bicubic` or `lanczos`; the last three are Pillow's, antialiased. `area` is the
            mean over what a pixel covers (OpenCV's INTER_AREA), img2dataset's default; below a ratio of about 1.3 plain
            interpolation stands in for it, 48 dB and more away on images with the spectrum of photographs. To enlarge,
            `area` is OpenCV's LANCZOS4, as in img2dataset.
        quality: of the JPEG, 1 to 100.
        reencode: False stores the file byte for byte as it came, EXIF and transparency included, if it is a JPEG, PNG
            or WebP, upright and already of the size asked for.
        max_pixels: images whose header announces more are refused before anything is decoded.

    Raises:
        ValueError: a value out of range.
    """

    size: int = 346
    mode: str = "square"
    enlarge: bool = True
    filter: str = "area"
    quality: int = 95
    reencode: bool = True
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        limits = {"size": _LONGEST_SIDE, "quality": 100, "max_pixels": MAX_PIXELS}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"source.images.{name} is {getattr(self, name)}: choose 1 to {most}")
        for name, choices in {"mode": MODES, "filter": ("area", *FILTERS)}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"source.images.{name} is {getattr(self, name)!r}: choose {', '.join(choices)}")

    def stored_size(self, width: int, height: int) -> Size:
        """Width and height under which an image of this width and height is stored."""
        if self.mode == "original":
            return width, height
        if self.mode == "square":
            return (self.size, self.size) if self.enlarge else (min(width, self.size), min(height, self.size))
        factor = self.size / min(width, height)
        return (width, height) if factor > 1 and not self.enlarge else (round(width * factor), round(height * factor))


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as a shard holds it, its size in pixels, and the size of the upright image that came."""

    content: bytes
    width: int
    height: int
    original_width: int
    original_height: int


class _Loaded(NamedTuple):
    """The pixels of a file (H, W, 3), not yet turned upright.

    JPEG may be loaded at 1/2, 1/4 or 1/8 of its size; `extent` is then the exact, fractional width and height.
    """

    pixels: np.ndarray
    extent: Extent
    turn: Image.Transpose | None


def decode(content: bytes, where: str = "image", *, max_pixels: int = MAX_PIXELS, upright: bool = False) -> Image.Image:
    """JPEG, PNG, WebP, GIF, BMP or TIFF as RGB: transparency on white, palettes and CMYK converted.

    The first frame is taken of several, the high byte of 16 bits. Colour profiles are ignored, and so is EXIF rotation
    unless `upright` is set (in TIFF, Pillow always heeds it).

    Kakao's reader ignores EXIF rotation too; it drops the alpha channel, which shows whatever colour lies under
    the transparent parts, most often black.

    Raises:
        Unusable: corrupt_image, or too_many_pixels where the header announces more than `max_pixels`.
    """
    with _opened(content, where, max_pixels) as file:
        file.load()
        turn = _turn(file) if upright else None
        image = _without_alpha(file).convert("RGB")
    return image if turn is None else image.transpose(turn)


def jpeg_pixels(content: bytes, least: Size | None = None, colours: str = "RGB") -> tuple[np.ndarray, Extent] | None:
    """A JPEG, grey or in colours, decoded by libjpeg-turbo alone: the pixels of `decode`, faster and without the GIL.

    Args:
        content: the file.
        least: width and height that the pixels must have at least; a JPEG of twice that, four or eight times, is read
            at 1/2, 1/4 or 1/8 (libjpeg's DCT scaling; its other scales take longer than full size). None reads all.
        colours: of the result, "RGB" or "RGBX", whose fourth channel is 255.

    Returns:
        uint8 (H, W, 3 or 4), and the width and height that the image takes of them, in pixels: read at a fraction, it
        may end within the last pixel. None is for `decode` to read or to refuse: no JPEG, CMYK, too many pixels by the
        header, or something in it that libjpeg warns of.
    """
    with suppress(ValueError):  # all that simplejpeg raises
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        if space not in ("YCbCr", "RGB", "Gray") or width * height > MAX_PIXELS:
            return None
        by = 1
        if least is not None:
            by = next((by for by in (8, 4, 2) if width >= by * least[0] and height >= by * least[1]), 1)
        pixels = simplejpeg.decode_jpeg(content, colours, min_width=-(-width // by), min_height=-(-height // by))
        return pixels, (width / by, height / by)
    return None


def store_image(content: bytes, settings: ImageSettings, where: str = "image") -> StoredImage:
    """What a server sent, as the file that goes into a shard; what it is, its content alone decides.

    Pixels are those of `decode` with `upright`, resized. A JPEG of four times the stored size or more is read at 1/2,
    1/4 or 1/8 (libjpeg's DCT scaling), whichever still has twice the stored size: 1.2 levels of 255 away, root mean
    square, and four times as fast on 12 megapixels.

    Args:
        content: the file.
        settings: how to store it.
        where: names the image in messages.

    Raises:
        Unusable: empty_image (no bytes), not_an_image (none of the six formats, a web page for instance),
            corrupt_image (broken or cut off), too_many_pixels (by the header; or as stored, with a side over 65,500
            or over 89 megapixels).
    """
    if not content:
        raise Unusable("empty_image", f"{where} has no bytes")
    extension = image_format(content)
    if extension is None:
        raise Unusable("not_an_image", f"{where} starts with {content[:16]!r}")
    with _opened(content, where, settings.max_pixels) as file:
        original = file.size
        size = settings.stored_size(*original)
        loaded = _loaded(file, content, size)
    turned = loaded.turn in _QUARTER_TURNS
    width, height = reversed(size) if turned else size
    original_width, original_height = reversed(original) if turned else original
    as_it_came = size == original and loaded.turn is None and extension in ("jpg", "png", "webp")
    if not as_it_came or settings.reencode:
        if max(size) > _LONGEST_SIDE or width * height > MAX_PIXELS:
            raise Unusable("too_many_pixels", f"{where} would be stored as {width} x {height}")
        content = _jpeg(_resized(loaded, size, settings.filter), loaded.turn, settings.quality)
    return StoredImage(content, width, height, original_width, original_height)


@contextmanager
def _opened(content: bytes, where: str, max_pixels: int) -> Iterator[Image.Image]:
    """The file with its header read; whatever goes wrong then or in the body makes it Unusable."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            if file.width * file.height > max_pixels:
                raise Unusable("too_many_pixels", f"{where} has {file.width} x {file.height}")
            yield file
    except Unusable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable("too_many_pixels", f"{where} ({error})") from error
    except UnidentifiedImageError as error:
        raise Unusable("corrupt_image", f"{where} starts with {content[:16]!r}, as no image does") from error
    except Exception as error:  # broken files make Pillow raise anything: OSError, struct.error, KeyError ...
        raise Unusable("corrupt_image", f"{where} ({error})") from error


def _loaded(file: Image.Image, content: bytes, size: Size) -> _Loaded:
    """All of the file as RGB, at least twice the size wanted where it is smaller than the file's own."""
    found = jpeg_pixels(content, (2 * size[0], 2 * size[1]))
    if found is not None:
        return _Loaded(*found, _turn(file))
    file.load()
    return _Loaded(np.asarray(_without_alpha(file).convert("RGB")), file.size, _turn(file))


def _without_alpha(image: Image.Image) -> Image.Image:
    """The image in a mode that convert("RGB") neither clips nor strips of its transparency."""
    if image.mode.startswith("I;16"):  # grey levels to 65,535
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), layer)


def _turn(file: Image.Image) -> Image.Transpose | None:
    """What brings a loaded file upright; None if it is, or if its EXIF is broken, which loses no image."""
    try:
        return _UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, struct.error, KeyError, TypeError, ValueError):  # as Pillow's JPEG reader for the resolution
        return None


def _resized(loaded: _Loaded, size: Size, name: str) -> np.ndarray:
    """(H, W, 3) of the width and height asked for."""
    pixels, (width, height) = loaded.pixels, loaded.extent
    if pixels.shape[1::-1] == size:
        return pixels
    reduced = pixels.shape[1::-1] != loaded.extent
    if name != "area" or reduced:  # Pillow, unlike OpenCV, resizes a picture that ends within a pixel
        method = FILTERS.get(name, Image.Resampling.HAMMING)
        return np.asarray(Image.fromarray(pixels).resize(size, method, box=(0, 0, width, height)))
    across, down = width / size[0], height / size[1]
    if min(across, down) < 1:
        by = cv2.INTER_LANCZOS4
    else:  # near a ratio of 1 interpolation is as good as the mean, and six times as fast
        by = cv2.INTER_LINEAR if across * down < 1.3**2 else cv2.INTER_AREA
    return cv2.resize(pixels, size, interpolation=by)


def _jpeg(pixels: np.ndarray, turn: Image.Transpose | None, quality: int) -> bytes:
    upright = pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(upright), quality, "RGB", "420"))
